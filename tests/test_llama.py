"""The seam to llama.cpp: what would abort the process is refused first, with the numbers.

The refusals run in one child process (this file, run as a script): where a check is missing,
llama.cpp takes the child with it and not the test run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Write
from tiny import EOS

from gguf_embed.errors import BadInput, BadModelFile, NativeFailed
from gguf_embed.native import library
from gguf_embed.native.context import MAX_SEQS, Context, ContextParams
from gguf_embed.native.model import Model, Tokens
from gguf_embed.native.quantizer import quantize_rows
from gguf_embed.vectors import Pooling

pytestmark = pytest.mark.native

# ---------------------------------------------------------------------------- refusals

PARAMS = ContextParams(n_ctx=64, n_ubatch=64, n_seq_max=4, n_threads=1, pooling=Pooling.LAST)


def ids(n: int, first: int = 0) -> Tokens:
    return (np.arange(first, first + n) % 200).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """The models of the child."""

    causal: Model
    encoder: Model

    def decoder(self, **changes: object) -> Context:
        return Context(self.causal, replace(PARAMS, **changes), encoder=False)

    def tapped(self, **changes: object) -> Context:
        return self.decoder(tap=True, **changes)

    def bert(self, **changes: object) -> Context:
        params = replace(PARAMS, pooling=Pooling.CLS, **changes)
        return Context(self.encoder, params, encoder=True)


def bad_token(lab: Lab, token: int) -> None:
    lab.tapped().run([np.array([1, token], np.int32)])


def closed_context(lab: Lab) -> None:
    with lab.tapped() as context:
        pass
    context.run([ids(3)])


def closed_model(lab: Lab) -> None:
    model = Model(lab.causal.path)
    model.close()
    model.tokenize(b"a text")


def context_of_a_closed_model(lab: Lab) -> None:
    model = Model(lab.causal.path)
    model.close()
    Context(model, PARAMS, encoder=False)


# What is refused, and what the message must say.
REFUSED: dict[str, tuple[Callable[[Lab], object], str]] = {
    "tap: more tokens than n_ctx": (lambda lab: lab.tapped().run([ids(65)]), "65 tokens.*64 tok"),
    "pooled: more tokens than n_ubatch": (
        lambda lab: lab.decoder(n_ctx=128).run([ids(65)]),
        "65 tokens.*64 tokens",
    ),
    "both sides attend: more tokens than n_ubatch": (
        lambda lab: lab.tapped(n_ctx=128, causal=False).run([ids(40), ids(25)]),
        "65 tokens.*64 tokens",
    ),
    "encoder: more tokens than n_ubatch": (
        lambda lab: lab.bert(n_ctx=128).run([ids(40), ids(25)]),
        "65 tokens.*64 tokens",
    ),
    "encoder: a text longer than the position table": (
        lambda lab: lab.bert(n_ctx=256, n_ubatch=256).run([ids(5), ids(129)]),
        "129 tokens.*128",
    ),
    "more sequences than n_seq_max": (
        lambda lab: lab.tapped().run([ids(3)] * 5),
        r"5 sequences.*1\.\.4 sequences",
    ),
    "one sequence is for the shared prefix": (
        lambda lab: lab.tapped().run([ids(5)] * 4, n_prefix=2),
        r"4 sequences.*1\.\.3 sequences",
    ),
    "prefix and texts together longer than n_ctx": (
        lambda lab: lab.tapped().run([ids(43), ids(43)], n_prefix=20),
        "46 tokens.*44 tokens",
    ),
    "nothing left after the prefix": (
        lambda lab: lab.tapped().run([ids(5), ids(6)], n_prefix=5),
        "shortest 0",
    ),
    "a prefix without a tap": (
        lambda lab: lab.decoder().run([ids(5), ids(6)], n_prefix=3),
        "prefix.*tap",
    ),
    "a prefix where both sides attend": (
        lambda lab: lab.tapped(causal=False).run([ids(5), ids(6)], n_prefix=3),
        "prefix.*causal",
    ),
    "a prefix where all tokens are pooled": (
        lambda lab: lab.tapped(pooling=Pooling.MEAN).run([ids(5), ids(6)], n_prefix=3),
        "prefix.*LAST",
    ),
    "an empty sequence": (lambda lab: lab.tapped().run([ids(3), ids(0)]), "shortest 0"),
    "an empty sequence for an encoder": (lambda lab: lab.bert().run([ids(0)]), "shortest 0"),
    "no sequence": (lambda lab: lab.tapped().run([]), "0 sequences"),
    "a token id that is too large": (lambda lab: bad_token(lab, lab.causal.n_vocab), r"0\.\.\d+"),
    "a negative token id": (lambda lab: bad_token(lab, -1), r"0\.\.\d+"),
    "n_seq_max of 257": (lambda lab: lab.tapped(n_seq_max=257), "n_seq_max=257.*1..256"),
    "n_seq_max of 0": (lambda lab: lab.tapped(n_seq_max=0), "n_seq_max=0.*1..256"),
    "n_ubatch of 0": (lambda lab: lab.tapped(n_ubatch=0), "n_ubatch=0"),
    "n_threads of 0": (lambda lab: lab.tapped(n_threads=0), "n_threads=0"),
    "n_ctx of 0": (lambda lab: lab.tapped(n_ctx=0), "n_ctx=0"),
    "a tap on an encoder": (lambda lab: lab.bert(tap=True), "encoder"),
    "a context that is closed": (closed_context, "closed"),
    "a model that is closed": (closed_model, "closed"),
    "a context of a model that is closed": (context_of_a_closed_model, "closed"),
}


# llama.cpp plans its memory for sequences of equal length, and aborts where they do not divide
# a microbatch.
def fill(lab: Lab, n_ubatch: int, n_seq_max: int, **changes: object) -> None:
    sizes: dict[str, object] = {"n_ctx": n_ubatch, "n_ubatch": n_ubatch, "n_seq_max": n_seq_max}
    with lab.decoder(**sizes, **changes) as context:
        assert np.isfinite(context.run([ids(1, i) for i in range(n_seq_max)])).all()
        assert np.isfinite(context.run([ids(n_ubatch)])).all()


ACCEPTED: dict[str, Callable[[Lab], object]] = {
    f"{pooling.name} of {n_seq_max} sequences in {n_ubatch} tokens, tap={tap}": partial(
        fill, n_ubatch=n_ubatch, n_seq_max=n_seq_max, pooling=pooling, tap=tap
    )
    for pooling in (Pooling.MEAN, Pooling.CLS, Pooling.LAST, Pooling.NONE)
    for n_ubatch, n_seq_max in ((100, 64), (7, 7), (65, 2), (1, 1), (MAX_SEQS, MAX_SEQS))
    for tap in (False, True)
}


def _child(causal: str, encoder: str) -> None:
    """Try every case; one JSON line each, so that a death names the culprit."""
    lab = Lab(causal=Model(Path(causal)), encoder=Model(Path(encoder)))
    attempts = {case: attempt for case, (attempt, _) in REFUSED.items()} | ACCEPTED
    for case, attempt in attempts.items():
        try:
            attempt(lab)
            said = "nothing"
        except (ValueError, BadInput) as error:
            said = str(error)
        print(json.dumps([case, said]), flush=True)


@pytest.fixture(scope="module")
def child(tiny_model: Write) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, str(tiny_model("qwen3")), str(tiny_model("bert"))]
    # Without the variable an aborting ggml calls for a debugger.
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )


def outcome(child: subprocess.CompletedProcess[str], case: str) -> str:
    said: dict[str, str] = dict(map(json.loads, child.stdout.splitlines()))
    assert case in said, f"the child ended with {child.returncode} after {list(said)[-1:]}"
    return said[case]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_call(case: str, child: subprocess.CompletedProcess[str]):
    assert re.search(REFUSED[case][1], outcome(child, case))


@pytest.mark.parametrize("case", ACCEPTED)
def test_taken_up_to_the_limits(case: str, child: subprocess.CompletedProcess[str]):
    assert outcome(child, case) == "nothing"


def test_nothing_reaches_stderr(child: subprocess.CompletedProcess[str]):
    assert (child.stderr, child.returncode) == ("", 0)


# ------------------------------------------------------------------- contexts and models


@pytest.fixture(scope="module")
def qwen3(tiny_model: Write) -> Iterator[Model]:
    model = Model(tiny_model("qwen3"))
    yield model
    model.close()


def test_a_context_that_cannot_be_had_says_what_to_do(
    qwen3: Model, monkeypatch: pytest.MonkeyPatch
):
    def out_of_memory(*_: object) -> None:
        library._on_log(4, b"failed to allocate buffer\n", None)

    monkeypatch.setattr(library.bindings(), "llama_init_from_model", out_of_memory)
    with pytest.raises(NativeFailed, match=r"64 tokens: failed to allocate .*smaller n_ctx"):
        Context(qwen3, PARAMS, encoder=False)


def test_closing_twice_is_harmless(tiny_model: Write):
    model = Model(tiny_model("qwen3"))
    with Context(model, PARAMS, encoder=False) as context:
        context.close()
    model.close()
    model.close()


def until_refused(step: Callable[[], object], said: list[BaseException]) -> None:
    try:
        while True:
            step()
    except BaseException as error:
        said.append(error)


def test_closing_waits_for_the_call_in_flight(qwen3: Model):
    """Threads decode, tokenize and ask while their context and model are closed."""
    for _ in range(10):
        model = Model(qwen3.path)
        context = Context(model, replace(PARAMS, n_ctx=512, n_ubatch=512), encoder=False)
        said: list[BaseException] = []

        steps = [
            partial(context.run, [ids(100)]),
            partial(model.tokenize, b"a text " * 500),
            partial(model.token_text, 3),
            model.special_tokens,
        ]
        threads = [threading.Thread(target=until_refused, args=(step, said)) for step in steps]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        context.close()
        model.close()
        for thread in threads:
            thread.join(timeout=30)
        assert [type(error) for error in said] == [BadInput] * len(threads)
        assert all("is closed" in str(error) for error in said)


def test_a_model_is_freed_after_its_contexts_whatever_is_closed_first(tiny_model: Write):
    model = Model(tiny_model("qwen3"))
    context = Context(model, PARAMS, encoder=False)
    expected = context.run([ids(5)])
    model.close()
    with pytest.raises(BadInput, match="is closed"):
        model.tokenize(b"a text")
    assert np.array_equal(context.run([ids(5)]), expected)
    context.close()
    with pytest.raises(BadInput, match="is closed"):
        context.forget()


_DROPPED = """
import gc, sys
from pathlib import Path
import numpy as np, psutil
from gguf_embed.errors import NativeFailed
from gguf_embed.native.context import Context, ContextParams
from gguf_embed.native.library import bindings
from gguf_embed.native.model import Model
from gguf_embed.vectors import Pooling

params = ContextParams(n_ctx=512, n_ubatch=512, n_seq_max=4, n_threads=1, pooling=Pooling.LAST,
                       tap=True)

def dropped():
    model = Model(Path(sys.argv[1]))
    Context(model, params, encoder=False).run([np.arange(100, dtype=np.int32)])
    context = Context(model, params, encoder=False)
    context.model = (context, model)  # a circle: only the collector frees it, in any order

def half_way():
    native, get = bindings(), bindings().llama_get_memory
    def fail(_):
        raise MemoryError
    native.llama_get_memory = fail
    try:
        Context(Model(Path(sys.argv[1])), params, encoder=False)
    except MemoryError:
        pass
    finally:
        native.llama_get_memory = get

def rss():
    gc.collect()
    return psutil.Process().memory_info().rss

gc.freeze()  # what importing made stays: to look through it each time takes most of the time
for step in (dropped, half_way):
    for _ in range(20):
        step()
    before = rss()
    for _ in range(200):
        step()
        gc.collect()
    print(step.__name__, (rss() - before) // 2**20)
"""


def test_what_is_dropped_without_close_is_freed(tiny_model: Write):
    done = subprocess.run(
        [sys.executable, "-c", _DROPPED, str(tiny_model("qwen3"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = dict(line.split() for line in done.stdout.splitlines())
    assert set(grown) == {"dropped", "half_way"}
    assert all(int(mib) < 50 for mib in grown.values()), grown  # one open takes a MiB or more


# ------------------------------------------------------------------------- files and log


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a GGUF at all", b"GGUF\x03\0\0\0" + b"\xff" * 64]
)
def test_a_bad_file_is_refused_with_the_reason(content: bytes, tmp_path: Path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(BadModelFile, match=r"bad\.gguf: llama\.cpp cannot load it: .*gguf"):
        Model(path)


def test_a_file_cut_short_is_refused(tiny_model: Write, tmp_path: Path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_model("qwen3").read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match="file bounds"):
        Model(path)


def test_a_path_that_is_not_ascii(tiny_model: Write, tmp_path: Path):
    path = tmp_path / "модель é.gguf"
    path.hardlink_to(tiny_model("qwen3"))
    model = Model(path)
    assert model.dim == 256
    model.close()


def test_llama_cpp_speaks_through_logging(
    tiny_model: Write, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    with caplog.at_level(logging.DEBUG, "gguf_embed.llama"):
        model = Model(tiny_model("qwen3"))
        with Context(model, PARAMS, encoder=False):
            pass
        model.close()
        with pytest.raises(BadModelFile):
            Model(Path("nowhere.gguf"))
    levels = {record.levelno: record.message for record in caplog.records}
    assert set(levels) == {logging.DEBUG, logging.WARNING} | (set(levels) & {logging.INFO})
    assert all(line and line == line.rstrip() for line in levels.values())
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------- devices


def test_the_cpu_is_a_device():
    (cpu,) = [device for device in library.devices() if device.kind == "cpu"]
    assert cpu.name == "CPU"
    assert cpu.backend == "CPU"
    assert cpu.total_bytes > 1 << 28


def test_unknown_weight_types_are_refused():
    for weight_type, n_row in (("Q9_9", 256), ("Q4_K", 255), ("Q8_0", 33)):
        with pytest.raises(NativeFailed, match=f"rows of {n_row} values as {weight_type}"):
            quantize_rows(np.zeros((2, n_row), np.float32), weight_type)


def test_another_build_has_another_id(monkeypatch: pytest.MonkeyPatch):
    ours = library.build_id()
    assert library.build_id.__wrapped__() == ours
    monkeypatch.setattr(library, "version", lambda: "another")
    assert library.build_id.__wrapped__() != ours


def in_child(code: str, folder: Path) -> str:
    """What a process prints whose libraries are those of `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", f"from gguf_embed.native import library\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, library.LIBRARY_VARIABLE: str(folder)},
    )
    return done.stdout + done.stderr.rpartition("\n")[0].rpartition("\n")[2]


def test_the_id_is_that_of_the_library_that_is_loaded(tmp_path: Path):
    for path in library.library_path().parent.iterdir():
        shutil.copy(path, tmp_path)  # of today: another build, as far as one can see
    said = in_child("print(library.build_id(), library.library_path().parent)", tmp_path)
    build_id, _, folder = said.strip().partition(" ")
    assert folder == str(tmp_path)
    assert build_id != library.build_id()


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
@pytest.mark.parametrize("call", ["devices", "system_info", "version", "build_id"])
def test_a_library_that_does_not_load_says_so(call: str, content: bytes | None, tmp_path: Path):
    if content is not None:
        (tmp_path / library.library_path().name).write_bytes(content)
    said = in_child(f"library.{call}()", tmp_path)
    assert re.search(r"NativeFailed: llama\.cpp cannot be loaded \(.*LLAMA_CPP_LIB_PATH is", said)
    assert "unset it" in said


# ------------------------------------------------------------------------------- tokens


def tokens_of(model: Model, text: str) -> list[int]:
    return model.tokenize(text.encode()).tolist()


def test_special_tokens_in_a_text_are_text(qwen3: Model):
    (eos,) = tokens_of(qwen3, "")
    assert qwen3.token_text(eos) == EOS
    spelled = tokens_of(qwen3, f"cat{EOS}dog<|im_start|>")
    assert spelled.count(eos) == 1
    assert spelled[-1] == eos
    assert "".join(map(qwen3.token_text, spelled[:-1])) == f"cat{EOS}dog<|im_start|>"


@pytest.mark.parametrize(
    ("architecture", "specials"), [("bert", "[CLS] [SEP] [MASK]"), ("xlmr", "<s> </s> <mask>")]
)
def test_special_tokens_in_a_text_are_text_for_encoders(
    architecture: str, specials: str, tiny_model: Write
):
    model = Model(tiny_model(architecture))
    first, last = tokens_of(model, "")
    body = tokens_of(model, f"cat {specials} dog")[1:-1]
    assert not {first, last} & set(body)
    assert not set(specials.split()) & set(map(model.token_text, body))
    assert {first, last} <= model.special_tokens()
    model.close()


def test_a_nul_is_a_character(qwen3: Model):
    cat, dog = (tokens_of(qwen3, word)[:-1] for word in ("cat", "dog"))
    before, *rest = tokens_of(qwen3, "\0cat\0dog")[:-1]
    assert qwen3.token_text(before) == "Ā"  # byte 0 in GPT-2's spelling
    assert rest == [*cat, before, *dog]


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000, 30_000])
def test_room_for_one_token_per_byte(qwen3: Model, n: int):
    assert len(tokens_of(qwen3, "\x01" * n)) == n + 1


if __name__ == "__main__":
    _child(*sys.argv[1:])


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("libggml-cpu-haswell.so", "haswell"),
        ("libggml-cpu-apple_m1.dylib", "apple_m1"),
        ("ggml-cpu-zen4.dll", "zen4"),
        ("libggml-cpu.so", ""),
        ("libggml-cpu.so.0", ""),
        ("libllama.so", ""),
    ],
)
def test_the_kind_of_cpu_in_the_name_of_a_library(name: str, variant: str):
    assert library.variant_in(name) == variant
