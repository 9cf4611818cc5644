"""The benchmark scripts: texts within their limits, files that load, no time without agreement."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.catalog import catalog
from gguf_embed.errors import BadOption
from gguf_embed.gguf import layout
from gguf_embed.gguf.header import read_header
from gguf_embed.lab import bench, plots
from gguf_embed.native.model import Model
from gguf_embed.vectors import Pooling

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import contenders
import machine
import peers
import quant_levels
import shapes
import workloads
from contenders import Load
from peers import Child, Entry, PeerError, Result
from workloads import Workload

pytestmark = pytest.mark.native

TINY = layout.Shape(
    architecture="qwen3",
    n_layer=2,
    n_embd=64,
    n_head=4,
    n_head_kv=2,
    head_dim=32,
    n_ff=96,
    n_vocab=512,
    n_ctx_train=256,
)


def card(shape: layout.Shape) -> catalog.ModelCard:
    """A catalog card of Qwen3-Embedding with another shape, and end tokens inside it."""
    known = catalog.find("qwen3-embedding-0.6b")
    assert known is not None
    return replace(known, shape=shape, bos_id=None, eos_id=500)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "tiny-F16.gguf"
    shapes.write_f16(card(TINY), path, vocab=None, seed=0)
    return path


# --- shapes


def test_every_size_of_the_issue_can_be_written():
    wanted = {f"qwen3-embedding-{size}" for size in ("0.6b", "4b", "8b")}
    assert wanted | {"bge-m3", "multilingual-e5-large"} <= shapes.known().keys()
    assert {"qwen3-reranker-0.6b", "bge-reranker-v2-m3"} <= shapes.known().keys()


def test_a_shape_is_the_file_that_llama_quantize_would_be_given(tiny: Path):
    header = read_header(tiny)
    plain = [replace(t, offset=0) for t in header.tensors]
    assert plain == list(layout.tensors(TINY, "F16"))
    assert (header.quant, header.pooling, header.causal) == ("F16", Pooling.LAST, True)
    # It must not pass for the model whose shape it has.
    assert catalog.by_header(header) is None


def test_the_made_vocabulary_has_a_token_per_byte_and_ends_the_text(tiny: Path):
    tokens = Model(tiny, no_alloc=True).tokenize("sth é".encode()).tolist()
    assert len(tokens) == len("s") + len(["th"]) + len(" ") + len("é".encode()) + len(["end"])
    assert tokens[-1] == 500


def test_weights_are_natural_and_no_row_repeats():
    (tensor,) = (t for t in layout.tensors(TINY, "F16") if t.name == "blk.1.ffn_down.weight")
    rows = shapes.values(tensor, np.random.default_rng(0)).reshape(tensor.shape[::-1])
    assert rows.dtype == np.float16
    assert rows.astype(np.float32).std() == pytest.approx(96**-0.5, rel=0.05)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    tensor = layout.tensors(TINY, "F16")[0]
    whole = shapes.values(tensor, np.random.default_rng(0))
    monkeypatch.setattr(shapes, "CHUNK_ELEMENTS", 10)
    assert np.array_equal(shapes.values(tensor, np.random.default_rng(0)), whole)


def test_a_copied_vocabulary_is_padded_to_the_shape(tiny: Path, tmp_path: Path):
    out = tmp_path / "padded.gguf"
    shapes.write_f16(card(replace(TINY, n_vocab=600)), out, vocab=tiny, seed=0)
    fields = gguf.GGUFReader(out).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(set(tokens)) == 600
    assert set(types[512:]) == {gguf.TokenType.UNUSED}
    text = b"some text"
    assert Model(out, no_alloc=True).tokenize(text).tolist() == (
        Model(tiny, no_alloc=True).tokenize(text).tolist()
    )


def test_a_vocabulary_is_not_cut_through_its_words(tiny: Path, tmp_path: Path):
    out = tmp_path / "cut.gguf"
    with pytest.raises(SystemExit, match="ordinary ones beyond the model's 200"):
        shapes.write_f16(card(replace(TINY, n_vocab=200)), out, vocab=tiny, seed=0)
    assert not out.exists()


def test_quantize_writes_the_level(tiny: Path, tmp_path: Path):
    out = tmp_path / "tiny-Q8_0.gguf"
    shapes.quantize(tiny, out, "Q8_0", n_threads=1)
    assert read_header(out).quant == "Q8_0"
    with pytest.raises(SystemExit, match=r"no quantization level 'Q9'; .*Q8_0"):
        shapes.quantize(tiny, out, "Q9", n_threads=1)


# --- workloads


def words(text: str) -> int:
    """A tokenizer for tests: words, and one end token."""
    return len(text.split()) + 1


SOURCES = [
    f"Summary of what function {i} gives back.\n\n" + f"It says word {i} here. " * (i % 300)
    for i in range(300)
]


@pytest.fixture
def few_docstrings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workloads, "docstrings", lambda: SOURCES)


@given(st.lists(st.text("ab \n", max_size=8), max_size=30).map(" ".join), st.integers(1, 20))
def test_a_cut_text_is_the_longest_beginning_that_fits(text: str, limit: int):
    found = workloads.cut(text, limit, words)
    assert text.startswith(found)
    assert words(found) <= limit
    rest = text[len(found) :].split(" ")
    if len(rest) > 1 or found == "":
        longer = found + " ".join(rest[:2])
        assert text == found or words(longer) > limit or len(found.split()) == limit - 1


@pytest.mark.usefixtures("few_docstrings")
@pytest.mark.parametrize("name", workloads.NAMES)
def test_a_workload_is_the_same_each_time_and_repeats_nothing(name: str):
    first = workloads.make(name, 30, words)
    assert first == workloads.make(name, 30, words)
    assert len(set(first.texts)) == 30
    assert workloads.make(name, 20, words).texts == first.texts[:20]
    assert first.sha256 != replace(first, prompt="other").sha256
    assert first.one_by_one == name.startswith("single")
    assert (first.prompt == "") == (name not in ("queries", "single-query"))


@pytest.mark.usefixtures("few_docstrings")
def test_workloads_keep_their_token_limits():
    mixed = [words(text) for text in workloads.make("mixed", 200, words).texts]
    assert max(mixed) == workloads.MAX_TOKENS
    low, high = workloads.LONG_TOKENS
    for text in workloads.make("long", 20, words).texts:
        assert low - 5 <= words(text) <= high


@pytest.mark.usefixtures("few_docstrings")
def test_too_many_texts_are_refused():
    with pytest.raises(ValueError, match="workload queries: 300 different texts, 301 wanted"):
        workloads.make("queries", 301, words)


def test_docstrings_are_read_without_importing(tmp_path: Path):
    for folder in ("tests", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text('"""In a test suite, or somebody else\'s."""')
    (tmp_path / "b.py").write_text('"""Module."""\nraise SystemExit\nclass A:\n  """Class."""\n')
    (tmp_path / "c.py").write_text('def f():\n  """Not ASCII: \\ud800."""\nasync def g(): "G."\n')
    (tmp_path / "d.py").write_text("this is no Python")
    assert set(workloads.docstrings_below(tmp_path)) == {"Module.", "Class.", "G."}


# --- machine


def test_flops_count_every_weight_twice_but_no_table(tiny: Path):
    header = read_header(tiny)
    per_layer = 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 96
    assert machine.weight_flops_per_token(header) == 2 * 2 * per_layer
    # Texts of 1 and 3 tokens see 1 and 1 + 2 + 3 tokens; heads are 4 x 32 wide, in 2 layers.
    assert machine.attention_flops_per_token(header, [1, 3]) == 4 * 2 * 4 * 32 * 7 / 4


# --- peers

VECTORS = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)


def test_equal_directions_agree_whatever_their_length():
    assert peers.check(VECTORS[:3] * 7, VECTORS, 0.9999) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [-1.0, np.nan])
def test_one_wrong_row_is_named(wrong: float):
    found = VECTORS.copy()
    found[2] *= wrong
    with pytest.raises(PeerError, match=r"at row 2, "):
        peers.check(found, VECTORS, 0.8)


def test_vectors_of_another_shape_do_not_agree():
    with pytest.raises(PeerError, match=r"\(5, 4\), ours are \(5, 8\)"):
        peers.check(VECTORS[:, :4], VECTORS, 0.8)


@given(st.integers(1, 40_000), st.booleans(), st.booleans())
def test_every_setting_offered_to_a_peer_holds_the_longest_text(
    n: int, one_by_one: bool, splits: bool
):
    for settings in peers.llama_cpp_settings(n):
        assert settings["n_batch"] == settings["n_ubatch"] == settings["n_ctx"] >= n
    offered = peers.server_settings(n, one_by_one, splits)
    assert len({json.dumps(settings) for settings in offered}) == len(offered)
    for settings in offered:
        flags = settings["flags"]
        slots, n_ctx, n_batch, n_ubatch = (
            int(flags[flags.index(name) + 1]) for name in ("-np", "-c", "-b", "-ub")
        )
        assert n_batch == n_ubatch
        assert splits or n_ubatch >= n
        assert n_ctx // slots > n
        assert slots == 1 or n_ctx <= peers.MAX_SERVER_CTX


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 200))
def test_the_beginning_keeps_its_budget(lengths: list[int], budget: int):
    work = Workload(name="mixed", texts=tuple(map(str, range(len(lengths)))))
    n = len(peers.beginning(work, lengths, budget).texts)
    assert n == 1 or sum(lengths[:n]) <= budget
    assert n == len(lengths) or sum(lengths[: n + 1]) > budget


def load(model: Path, kind: str = "llama-cpp-python", **more: object) -> Load:
    return Load(kind=kind, model=str(model), n_threads=1, max_tokens=64, **more)


WORK = Workload(name="mixed", texts=("one text", "another, longer text", "x"), prompt="say: ")


def test_a_child_that_dies_is_told_apart_from_one_that_refuses(tiny: Path, tmp_path: Path):
    child = Child(load(tiny), tmp_path)
    os.kill(child.pid, signal.SIGSEGV)
    with pytest.raises(PeerError, match="died of SIGSEGV during 'run'"):
        child.run(WORK)
    child.kill()
    with pytest.raises(PeerError, match="TypeError"):
        Child(load(tiny, settings={"n_ctx": "many"}), tmp_path)


SERVER = """#!{python}
import base64, json, struct, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(b"{{}}")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rows = []
        for i, text in enumerate(request["input"]):
            vector = [float(len(text)), 1.0]
            if request["encoding_format"] == "base64":
                vector = base64.b64encode(struct.pack("<2f", *vector)).decode()
            rows.insert(0, {{"index": i, "embedding": vector}})
        self.answer(json.dumps({{"data": rows}}).encode())

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True  # without saying so, as a server does with an idle one

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_request": 2, "base64": True},
        {"per_request": 1, "concurrency": 3, "flags": ["-np", "4"]},
    ],
)
def test_a_server_answers_in_order_over_connections_that_it_closes(
    settings: dict[str, object], tmp_path: Path
):
    binary = tmp_path / "server"
    binary.write_text(SERVER.format(python=sys.executable))
    binary.chmod(0o755)
    server = contenders.LlamaServer(
        load(tmp_path, "llama-server", settings=settings, binary=str(binary))
    )
    try:
        found = server.embed(["a", "bbb", "cc"], "12")
        assert found.tolist() == [[3, 1], [5, 1], [4, 1]]
        assert server.peak_bytes() > 2**20
        assert server.facts["http_s"] > 0
    finally:
        server.close()


class FakeIkContext:
    """Computes a batch of lists of tokens: of each its length and its first token."""

    def __init__(self, model: object, **options: object) -> None:
        self.options = options
        self.done: list[list[list[int]]] = []

    def kv_cache_clear(self) -> None:
        self.empty = True

    def decode(self, batch: list[list[int]]) -> int:
        assert self.empty, "the texts of the batch before are still there"
        self.empty = False
        self.done.append(batch)
        return 0

    def get_embeddings_seq(self, place: int) -> list[float]:
        tokens = self.done[-1][place]
        return [float(len(tokens)), float(tokens[0])]


def test_ik_llama_cpp_gets_full_batches_and_its_answers_find_their_texts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    freed: list[object] = []
    api = SimpleNamespace(
        llama_batch_free=freed.append, llama_model_default_params=lambda: SimpleNamespace()
    )
    model = SimpleNamespace(tokenize=lambda text: list(text.encode()))

    def opened(path: str, *, use_mmap: bool) -> SimpleNamespace:
        assert api.llama_model_default_params().repack_tensors is True
        assert use_mmap is False  # repacked weights are no longer the file's
        return model

    internals = SimpleNamespace(
        make_embedding_batch=lambda tokens: tokens, IkModel=opened, IkContext=FakeIkContext
    )
    package = SimpleNamespace(_ctypes_api=api, _internals=internals)
    monkeypatch.setitem(sys.modules, "ik_llama_cpp", package)
    monkeypatch.setattr(contenders, "version", lambda name: f"{name} 1")
    settings = {"repack": True, "n_ubatch": 10}
    ik = contenders.IkLlamaCpp(load(tmp_path, "ik-llama-cpp", settings=settings))
    texts = ["abc", "b", "cdefghi", "dd", *["e"] * 70]
    found = ik.embed(texts, "")
    first = [float(text.encode()[0]) for text in texts]
    expected = np.array(list(zip(map(len, texts), first, strict=True)), np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    batches = ik._context.done
    assert freed == batches
    assert max(sum(map(len, batch)) for batch in batches) <= 10
    ik._context.decode = lambda batch: 1
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):
        ik.embed(texts, "")


def test_fastembed_gets_texts_by_length_and_its_answers_find_theirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    seen: list[str] = []

    class TextEmbedding:
        added: dict[str, object]

        def __init__(self, name: str, **options: object) -> None:
            assert name == self.added["model"]
            assert options == {
                "threads": 1,
                "specific_model_path": str(tmp_path),
                "local_files_only": True,
            }
            cut = SimpleNamespace(enable_truncation=self.cut_at)
            self.model = SimpleNamespace(tokenizer=cut)

        @classmethod
        def add_custom_model(cls, **options: object) -> None:
            cls.added = options

        def cut_at(self, n_tokens: int) -> None:
            self.limit = n_tokens

        def embed(self, texts: list[str], *, batch_size: int) -> Iterator[list[float]]:
            assert (self.limit, batch_size) == (64, 4)
            seen.extend(texts)
            return ([float(len(text)), 1.0] for text in texts)

    description = SimpleNamespace(
        ModelSource=SimpleNamespace, PoolingType=SimpleNamespace(MEAN="mean")
    )
    monkeypatch.setitem(sys.modules, "fastembed", SimpleNamespace(TextEmbedding=TextEmbedding))
    monkeypatch.setitem(sys.modules, "fastembed.common.model_description", description)
    monkeypatch.setattr(contenders, "version", lambda name: f"{name} 1")
    settings = {"file": "int8.onnx", "batch_size": 4}
    fast = contenders.FastEmbed(load(tmp_path, "fastembed", settings=settings))
    assert fast.embed(["a", "ccc", "bb"], ">").tolist() == [[2, 1], [4, 1], [3, 1]]
    assert seen == [">ccc", ">bb", ">a"]
    assert TextEmbedding.added["model_file"] == "int8.onnx"


def run_main(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch, listed: list[Entry]) -> None:
    monkeypatch.setattr(peers, "entries", lambda *_: listed)
    monkeypatch.setattr(machine, "gemm_flops_per_s", lambda: 1e11)
    peers.main(argv)


@pytest.mark.usefixtures("few_docstrings")
def test_one_run_from_texts_to_the_last_line(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Ours, a peer that agrees, one that cuts texts in silence, one that does not start."""
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))

    def entry(name: str, made: Load, *candidates: dict[str, object]) -> Entry:
        return Entry(name=name, load=made, candidates=candidates, tolerance=0.999)

    short = {"n_ctx": 256, "n_batch": 8, "n_ubatch": 8}
    whole = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 256}
    listed = [
        entry("gguf-embed", load(tiny, "gguf-embed"), {"tune": False}),
        entry("whole", load(tiny), {"n_ctx": "many"}, whole),
        entry("short", load(tiny), short),
        entry("gone", load(tmp_path / "gone.gguf"), {}),
    ]
    out = tmp_path / "results" / "run.json"
    argv = [str(tiny), "--workload", "queries", "--n", "6", "--rounds", "2"]
    run_main([*argv, "--out", str(out)], monkeypatch, listed)

    shown = capsys.readouterr().out
    run = json.loads(shown.splitlines()[-1])
    assert json.loads(out.read_text()) == run
    (work,) = run["workloads"]
    assert (work["workload"], work["n_texts"]) == ("queries", 6)
    ours, fitting, cut, gone = work["engines"]
    assert len(ours["seconds"]) == len(fitting["seconds"]) == 2
    assert fitting["settings"] == whole
    assert "TypeError" in fitting["tried"][0]["error"]
    assert fitting["ours_is_times"] > 0
    assert fitting["min_cosine"] > 0.999
    assert min(ours["peak_bytes"], fitting["peak_bytes"]) > 2**20
    assert "disagree" in cut["error"]
    assert "gone.gguf" in gone["error"]
    assert "seconds" not in cut
    assert "seconds" not in gone
    assert "short: no result: vectors disagree" in shown


class FakeContender:
    """Vectors of one number, the length of the text; remembers its calls."""

    def __init__(self) -> None:
        self.facts: dict[str, object] = {}
        self.calls: list[tuple[list[str], str]] = []

    def embed(self, texts: Sequence[str], prompt: str) -> contenders.Vectors:
        self.calls.append((list(texts), prompt))
        return np.array([[len(text)] for text in texts], dtype=np.float32)

    def peak_bytes(self) -> int:
        return 1

    def close(self) -> None: ...


@pytest.mark.parametrize("one_by_one", [False, True])
def test_one_by_one_is_a_timed_call_per_text(one_by_one: bool, tmp_path: Path):
    texts, vectors = tmp_path / "texts.json", tmp_path / "vectors.npy"
    texts.write_text(json.dumps(asdict(replace(WORK, one_by_one=one_by_one))))
    fake = FakeContender()
    answer = contenders.timed(fake, texts=str(texts), vectors=str(vectors))
    calls = [["one text"], ["another, longer text"], ["x"]]
    assert fake.calls == [(call, "say: ") for call in (calls if one_by_one else [list(WORK.texts)])]
    assert len(answer["seconds"]) == len(fake.calls)
    assert np.load(vectors).tolist() == [[8], [20], [1]]


def test_latency_is_compared_without_the_cost_of_http():
    def result(name: str, ms: float, http_ms: float) -> Result:
        made = Entry(name=name, load=load(Path("m")), candidates=({},), tolerance=0.9)
        facts = {"http_s": http_ms / 1e3}
        return Result(entry=made, facts=facts, seconds=[[ms / 1e3] * 4])

    work = Workload(name="single", texts=tuple("abcd"), one_by_one=True)
    rows = peers.speed_summary([result("ours", 2, 0), result("server", 5, 1)], work, 40)
    assert rows[1]["ours_is_times"] == pytest.approx(2)
    assert rows[1]["latency_s"]["p50"] == pytest.approx(0.005)
    assert peers.table(rows, one_by_one=True).splitlines()[2].split()[:5] == [
        *("server", "5.00", "5.00", "1.00", "2.00x"),
    ]


def test_ratios_are_taken_round_by_round():
    def result(*seconds: float) -> Result:
        made = Entry(name="x", load=load(Path("m")), candidates=({},), tolerance=0.9)
        return Result(entry=made, seconds=[[s] for s in seconds])

    # The machine slows down threefold; each peer's share of it does not change.
    work = Workload(name="mixed", texts=("a", "b"))
    rows = peers.speed_summary([result(1, 2, 3), result(2, 4, 6)], work, 12)
    assert rows[1]["ours_is_times_range"] == [2, 2]
    assert rows[1]["tokens_per_s"] == 3
    assert rows[1]["texts_per_s"] == 0.5


# -- quant_levels --------------------------------------------------------------------------------


def test_levels_are_compared_run_after_run(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(bench, "ROUND_S", 0.01)
    monkeypatch.setattr(bench, "N_LATENCIES", 2)
    texts, out = tmp_path / "t.txt", tmp_path / "out"
    texts.write_text("\n".join(f"the {word} sat" for word in ("cat", "dog", "mat", "sun")))
    files = [str(tiny_model("bert")), str(tiny_model("bert", "Q8_0"))]
    args = [*files, "--texts", str(texts), "--no-tune", "--rounds", "1", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: [])  # drawn in the next run
        quant_levels.main(args)
    assert not (out / "stability.md").exists()
    quant_levels.main([*args, "--repeat", "1"])
    assert sorted(path.name for path in out.iterdir()) == [
        *("dims.png", "levels.png", "report.md", "run-1.json", "run-2.json", "stability.md"),
    ]
    printed = capsys.readouterr().out
    assert "# The same comparison 2 times: Tiny bert" in printed
    assert re.search(r"^\| Q8_0 \| [\d,]+, [\d,]+ \| \d+ % \| ", printed, re.MULTILINE)
    assert (out / "stability.md").read_text() in printed
    texts.write_text("another\ntext")
    with pytest.raises(BadOption, match=r"run-1\.json is a run of Tiny bert on other texts"):
        quant_levels.main(args)


def run_of(f32: float, q8: float, verdict: str, advice: str = "take Q8_0") -> dict[str, Any]:
    def level(name: str, speed: float, verdict: str) -> dict[str, Any]:
        return {
            "level": {"name": name},
            "costs": {"tokens_per_s": speed},
            "quality": {"by_dim": {"64": 0.5, "384": 0.75}},
            "verdict": verdict,
        }

    results = [level("F32", f32, "the reference"), level("Q8_0", q8, verdict)]
    return {"model": "m", "results": results, "advice": advice}


def test_stability_tells_numbers_from_words():
    good = "as good as F32 within {} % on these texts, {}x faster, 28 % of the size"
    same = [run_of(100, 150, good.format("0.4", "1.5")), run_of(50, 80, good.format("0.3", "1.6"))]
    told = quant_levels.stability(same)
    assert "| Q8_0 | 150, 80 | 88 % | 1.50x, 1.60x | 7 % | 0.7500 | " in told
    assert "speeds of a level are at most 100 % apart, their ratios to F32 at most 7 %" in told
    assert "2 of 2 levels get the same words in every run, whatever the numbers\n" in told
    assert "- advice: the same in every run\n  - take Q8_0\n" in told
    slower = run_of(100, 90, good.format("0.4", "1.1").replace("faster", "slower"), "take F32")
    told = quant_levels.stability([*same, slower])
    assert "1 of 2 levels get the same words in every run, whatever the numbers: not Q8_0" in told
    assert "- advice: not the same in every run\n  - take Q8_0\n  - take F32\n" in told


def test_a_level_that_failed_in_one_run_has_no_speed_there():
    failed = run_of(100, 1, "fails on this machine: SIGILL")
    failed["results"][1] |= {"costs": None, "quality": None}
    told = quant_levels.stability([run_of(100, 150, "fine"), failed])
    assert (
        "| Q8_0 | 150 | 0 % | 1.50x | 0 % | 0.7500 | fine; fails on this machine: SIGILL |" in told
    )
