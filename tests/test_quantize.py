"""Quantizing: llama.cpp's own bytes, an exact forecast, and nothing kept that was not proved."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
import pytest
from conftest import Write
from test_imatrix import sums_and_counts, write_imatrix
from tiny import Pooling

from gguf_embed import cli
from gguf_embed.errors import (
    BadModelFile,
    BadOption,
    DoesNotFit,
    GgufEmbedError,
    NativeFailed,
    OutputFailed,
)
from gguf_embed.gguf.header import Header, read_header
from gguf_embed.gguf.tensors import TensorInfo
from gguf_embed.lab import forecast as forecasting
from gguf_embed.lab import quantize
from gguf_embed.lab.forecast import Fallback, find_source, forecast, level_named
from gguf_embed.lab.quantize import make
from gguf_embed.lab.quantize_child import Recipe
from gguf_embed.store import hub, names
from gguf_embed.store.local import Source
from gguf_embed.system import files

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def qwen3(tiny_model: Write) -> Path:
    """Rows of 256 and 512: every level fits."""
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def narrow(tiny_model: Write) -> Path:
    """Rows of 96 and 160: no K-quant fits."""
    return tiny_model("qwen2_bidirectional")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in read_header(path).tensors}


# ---------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize("level", ["Q4_K_M", "Q5_K_S", "Q6_K"])
def test_the_file_is_the_one_of_llama_cpp(
    qwen3: Path, tiny_model: Write, tmp_path: Path, level: str
):
    """`tiny` calls llama_model_quantize itself for levels that gguf-py cannot write."""
    expected = forecast(qwen3, Recipe(level=level))
    made = make(expected, tmp_path / "ours.gguf")
    assert made.path.read_bytes() == tiny_model("qwen3", level).read_bytes()
    assert types_of(made.path) == {tensor.name: tensor.type for tensor in expected.tensors}
    assert made.n_bytes == made.path.stat().st_size
    assert 0 <= expected.n_bytes - made.n_bytes <= 1100
    assert left_in(tmp_path) == ["ours.gguf"]


def test_vectors_stay_near_the_source_and_the_level_tells_how_near(qwen3: Path, tmp_path: Path):
    eight, four = (
        make(forecast(qwen3, Recipe(level=level)), tmp_path / f"{level}.gguf").canaries
        for level in ("Q8_0", "Q4_0")
    )
    assert eight.min > 0.998
    assert 0.85 < four.min < four.mean < eight.mean < 1


def test_types_of_single_tensors(qwen3: Path):
    """These models have no output matrix of their own: its type is the embedding table's."""

    def table(**choices: str) -> tuple[str, set[str]]:
        expected = forecast(qwen3, Recipe(level="Q4_0", **choices))
        types = {tensor.name: tensor.type for tensor in expected.tensors}
        return types.pop("token_embd.weight"), {*types.values()}

    others = {"F32", "Q4_0"}
    assert table() == ("Q6_K", others)
    assert table(token_embedding_type="q8_0") == ("Q8_0", others)
    assert table(output_type="F16") == ("F16", others)


def test_the_same_level_makes_sense_with_another_type_for_one_tensor(qwen3: Path):
    expected = forecast(qwen3, Recipe(level="F32", token_embedding_type="Q8_0"))
    assert expected.types == {"F32": 23, "Q8_0": 1}


def test_pure_leaves_no_mixture(qwen3: Path):
    mixed, pure = (forecast(qwen3, Recipe(level="Q4_K_M", pure=pure)) for pure in (False, True))
    assert mixed.types == {"Q4_K": 12, "F32": 9, "Q6_K": 3}
    assert pure.types == {"Q4_K": 15, "F32": 9}


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("Q8_0", {}),
        ("Q4_0", {(96, "Q6_K", "Q8_0"): 1}),  # the table; the level itself has blocks of 32
        # By hand, of 2 layers: 6 matrices of a layer have rows of 96, ffn_down has 160. The
        # mixture gives more bits to attn_v and ffn_down of the last layer, and to the table.
        (
            "Q4_K_M",
            {
                (96, "Q4_K", "Q5_0"): 11,
                (96, "Q6_K", "Q8_0"): 2,
                (160, "Q4_K", "Q5_0"): 1,
                (160, "Q6_K", "Q8_0"): 1,
            },
        ),
    ],
)
def test_what_does_not_fit_the_rows_is_told(
    narrow: Path, level: str, expected: dict[tuple[int, str, str], int]
):
    fallbacks = forecast(narrow, Recipe(level=level)).fallbacks
    told = {(one.row_length, one.wanted, one.given): one.n_tensors for one in fallbacks}
    assert told == expected


@pytest.mark.parametrize("which", ["token_embedding_type", "output_type"])
def test_a_chosen_type_is_no_fallback(narrow: Path, which: str):
    told = forecast(narrow, Recipe(level="Q4_K_M", **{which: "Q8_0"})).fallbacks  # type: ignore[arg-type]
    assert sum(one.n_tensors for one in told) == 14


@pytest.mark.parametrize(
    ("name", "level"),
    [("q4_k", "Q4_K_M"), ("Q3_K", "Q3_K_M"), ("fp16", "F16"), ("iq4_xs", "IQ4_XS")],
)
def test_levels_by_their_other_names(name: str, level: str):
    assert level_named(name) == level


def test_a_fallback_in_words():
    one = Fallback(row_length=384, wanted="Q6_K", given="Q8_0", n_tensors=1)
    assert str(one) == ("1 matrix has rows of 384, not whole blocks of 256: Q6_K fell back to Q8_0")
    assert str(replace(one, n_tensors=30)).startswith("30 matrices have rows of 384")


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (Recipe(level="Q4_K_X"), BadOption, "no level is called 'Q4_K_X'; did you mean Q4_K_"),
        (Recipe(level="fp32"), BadOption, "is F32 already; copy the file"),
        (Recipe(level="NVFP4"), BadOption, "no level is called 'NVFP4'"),
        (
            Recipe(level="Q4_0", token_embedding_type="Q4"),
            BadOption,
            "no tensor type is called 'Q4'; did you mean Q4_",
        ),
        (  # needs an importance matrix, which llama.cpp asks for by aborting
            Recipe(level="Q4_0", token_embedding_type="IQ2_XXS"),
            BadOption,
            "no tensor type is called 'IQ2_XXS'",
        ),
        (
            Recipe(level="IQ2_XS"),
            BadOption,
            r"IQ2_XS is noise without .* \(12 tensors, .*--imatrix FILE",
        ),
        (Recipe(level="Q2_K_S"), BadOption, r"Q2_K_S is noise without"),
        (Recipe(level="Q4_0", imatrix=Path("none.gguf")), BadModelFile, r"none\.gguf: cannot be"),
    ],
)
def test_recipes_that_cannot_be_followed(
    qwen3: Path, recipe: Recipe, error: type[GgufEmbedError], message: str
):
    with pytest.raises(error, match=message):
        forecast(qwen3, recipe)


def test_a_type_whose_blocks_do_not_fill_the_rows(narrow: Path):
    """llama.cpp's release builds do not look, and write a file that they cannot read."""
    with pytest.raises(BadOption, match="has rows of 96, not whole Q4_K blocks of 256"):
        forecast(narrow, Recipe(level="Q4_0", token_embedding_type="Q4_K"))


def test_a_quantized_source_is_refused_unless_forced(tiny_model: Write, tmp_path: Path):
    source = tiny_model("qwen3", "Q8_0")
    with pytest.raises(BadOption, match=r"quantized already \(Q8_0, 15 of 24 tensors\).*--force"):
        forecast(source, Recipe(level="Q4_0"))
    made = make(forecast(source, Recipe(level="Q4_0", force=True)), tmp_path / "twice.gguf")
    assert set(types_of(made.path).values()) == {"F32", "Q4_0", "Q6_K"}


def test_the_better_source_of_a_known_model_is_named():
    builtin = names.resolve("all-minilm-l6-v2").path
    assert builtin
    with pytest.raises(BadOption, match="quantize all-minilm-l6-v2:F16, or insist"):
        forecast(builtin, Recipe(level="Q4_0"))


def test_sources_that_are_no_whole_model(tiny_model: Write, tmp_path: Path):
    imatrix = write_imatrix(tmp_path / "i.gguf", sums_and_counts([[1, 2]], [[1]]))
    with pytest.raises(BadModelFile, match="an importance matrix for quantizing; pass a model"):
        forecast(imatrix, Recipe(level="Q4_0"))
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_model("qwen3").read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match="truncated"):
        forecast(short, Recipe(level="Q4_0"))


def test_a_part_of_a_split_model(qwen3: Path, monkeypatch: pytest.MonkeyPatch):
    whole = read_header(qwen3)
    first = replace(whole, metadata={**whole.metadata, "split.no": 0, "split.count": 2})
    monkeypatch.setattr(forecasting, "read_header", lambda _: first)
    with pytest.raises(BadModelFile, match="part of a model in 2 files; join them with"):
        forecast(qwen3, Recipe(level="Q4_0"))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (f"{'x' * 245}.gguf", OutputFailed, "not written: File name too long; choose"),
        ("out", BadOption, r"name a file that ends in \.gguf"),
        ("folder.gguf", BadOption, "is a directory; name a file in it"),
        ("source.gguf", BadOption, "is the source itself"),
        ("none/out.gguf", OutputFailed, "there is no directory .*none; make it: mkdir -p"),
    ],
)
def test_targets_that_make_no_sense(
    qwen3: Path, tmp_path: Path, name: str, error: type[GgufEmbedError], message: str
):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "source.gguf").symlink_to(qwen3)
    with pytest.raises(error, match=message):
        make(forecast(qwen3, Recipe(level="Q8_0")), tmp_path / name)
    assert left_in(tmp_path) == ["folder.gguf", "source.gguf"]


# -------------------------------------------------------------------- nothing half-done is left


@pytest.fixture
def older(tmp_path: Path) -> Iterator[Path]:
    """A target that is there already, and must be as it was at the end."""
    path = tmp_path / "out.gguf"
    path.write_text("older")
    yield path
    assert path.read_text() == "older"
    assert left_in(tmp_path) == ["out.gguf"]


def test_a_full_disk_is_seen_before(qwen3: Path, older: Path, monkeypatch: pytest.MonkeyPatch):
    expected = forecast(qwen3, Recipe(level="Q8_0"))
    free = expected.n_bytes - 1
    monkeypatch.setattr(files, "free_bytes", lambda _: free)
    with pytest.raises(DoesNotFit, match=r"Q8_0 of qwen3-F32\.gguf takes 1 MiB") as caught:
        make(expected, older)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (expected.n_bytes, free)


class Usage:
    def __init__(self, *, free: int) -> None:
        self.free = free


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up(qwen3: Path, older: Path):
    expected = forecast(qwen3, Recipe(level="Q8_0"))
    with (
        file_size_limit(100_000),
        pytest.raises(OutputFailed, match=r"only 100000 of about \d+ bytes could be written"),
    ):
        make(expected, older)


def test_progress_counts_tensors(qwen3: Path, tmp_path: Path):
    seen: list[tuple[int, int, str]] = []
    make(
        forecast(qwen3, Recipe(level="Q8_0")),
        tmp_path / "out.gguf",
        on_progress=lambda *progress: seen.append(progress),
    )
    assert [(n, total) for n, total, _ in seen] == [(n, 24) for n in range(1, 25)]
    assert seen[1][2] == "token_embd.weight"


LOG = '{"log": "[   3/  24] blk.0.attn_k.weight - [256, 128], type = f32, size = 1 MiB"}'


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """child(script) puts a shell script in place of the process that quantizes."""
    path = tmp_path_factory.mktemp("bin") / "python"

    def replace_by(script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace_by


def test_an_interruption_ends_the_work_at_once(
    qwen3: Path, older: Path, child: Callable[[str], None]
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    expected = forecast(qwen3, Recipe(level="Q8_0"))
    child(f"echo '{LOG}'; exec sleep 60")
    before = psutil.Process().children()  # such as the resource tracker of multiprocessing
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        make(expected, older, on_progress=interrupt)
    assert time.monotonic() - began < 30
    assert psutil.Process().children() == before


def test_an_abort_of_llama_cpp_is_an_error_of_ours(
    qwen3: Path, older: Path, child: Callable[[str], None]
):
    expected = forecast(qwen3, Recipe(level="Q8_0"))
    child(
        f"echo '{LOG}'; echo 'ggml-quants.c:9: GGML_ASSERT(besti1 >= 0) failed' >&2; "
        "echo 'a backtrace' >&2; kill -ABRT $$"
    )
    message = r"died after \[   3/  24\] blk\.0\.attn_k\.weight: SIGABRT .*GGML_ASSERT\(besti1"
    with pytest.raises(NativeFailed, match=message):
        make(expected, older)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("another model", "gives other vectors than its source and was removed: their mean cosine"),
        ("another level", "has other tensor types than llama.cpp's dry run said"),
        ("half a file", "does not embed and was removed: .*truncated"),
        ("NaN", "does not embed and was removed: .*NaN"),
    ],
)
def test_a_bad_result_is_removed(
    qwen3: Path,
    tiny_model: Write,
    older: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    message: str,
):
    expected = forecast(qwen3, Recipe(level="F16"))

    def write_badly(source: Path, target: Path, recipe: Recipe, **_: object) -> None:
        data = bytearray(tiny_model("qwen3", "F16").read_bytes())
        if damage == "another model":
            data = bytearray(tiny_model("qwen3", "F16", seed=1).read_bytes())
        elif damage == "another level":
            data = bytearray(qwen3.read_bytes())
        elif damage == "half a file":
            del data[len(data) // 2 :]
        else:
            header = read_header(tiny_model("qwen3", "F16"))
            norm = header.tensor("output_norm.weight")
            assert norm
            start = header.header_bytes + norm.offset
            data[start : start + norm.n_bytes] = np.full(256, np.nan, "<f4").tobytes()
        target.write_bytes(data)

    monkeypatch.setattr(quantize, "run_quantizer", write_badly)
    with pytest.raises(NativeFailed, match=message):
        make(expected, older)


# --------------------------------------------------------------------- rerankers and the silent


@pytest.mark.parametrize(
    ("architecture", "choices"),
    [("qwen3_reranker", {}), ("qwen3", {"pooling": None}), ("bert", {"pooling": Pooling.NONE})],
)
def test_files_that_do_not_pool_are_verified_all_the_same(
    tiny_model: Write, tmp_path: Path, architecture: str, choices: dict[str, object]
):
    source = tiny_model(architecture, **choices)
    made = make(forecast(source, Recipe(level="F16")), tmp_path / "out.gguf")
    assert made.canaries.min > 0.999


# -------------------------------------------------------------------------- importance matrices


def imatrix_for(model: Path, path: Path, *, n_more: int = 0) -> Path:
    """Importances for all matrices but the table; `n_more` inputs too many."""
    random = np.random.RandomState(0)
    tensors: dict[str, np.ndarray] = {}
    for tensor in read_header(model).tensors:
        if len(tensor.shape) == 2 and tensor.name != "token_embd.weight":
            sums = random.random_sample((1, tensor.shape[0] + n_more)) ** 4
            tensors |= sums_and_counts(sums, [[2]], tensor.name)
    return write_imatrix(path, tensors)


def test_an_importance_matrix_changes_the_bytes_and_is_noted(qwen3: Path, tmp_path: Path):
    imatrix = imatrix_for(qwen3, tmp_path / "i.gguf")
    made = make(forecast(qwen3, Recipe(level="Q4_0", imatrix=imatrix)), tmp_path / "with.gguf")
    plain = make(forecast(qwen3, Recipe(level="Q4_0")), tmp_path / "without.gguf")
    assert types_of(made.path) == types_of(plain.path)
    one, other = (path.read_bytes()[-100_000:] for path in (made.path, plain.path))
    assert one != other
    metadata = read_header(made.path).metadata
    assert {key: value for key, value in metadata.items() if "imatrix" in key} == {
        "quantize.imatrix.file": "i.gguf",
        "quantize.imatrix.dataset": "some.txt",
        "quantize.imatrix.entries_count": 14,
        "quantize.imatrix.chunks_count": 7,
    }


def test_an_importance_matrix_opens_the_lowest_levels(qwen3: Path, tmp_path: Path):
    imatrix = imatrix_for(qwen3, tmp_path / "i.gguf")
    assert forecast(qwen3, Recipe(level="IQ2_XS", imatrix=imatrix)).types["IQ2_XS"] == 12
    part = sums_and_counts([[1] * 256], [[1]], "blk.0.attn_q.weight")
    write_imatrix(tmp_path / "part.gguf", part)
    with pytest.raises(BadOption, match=r"\(11 tensors, .*part\.gguf lacks it"):
        forecast(qwen3, Recipe(level="IQ2_XS", imatrix=tmp_path / "part.gguf"))


def test_another_models_importance_matrix_is_refused(qwen3: Path, narrow: Path, tmp_path: Path):
    longer = imatrix_for(qwen3, tmp_path / "longer.gguf", n_more=1)
    with pytest.raises(BadOption, match=r"blk\.0\.attn_q\.weight has 256 inputs, there 257"):
        forecast(qwen3, Recipe(level="Q4_0", imatrix=longer))
    other = sums_and_counts([[1, 2]], [[1]], "blk.9.attn_q.weight")
    write_imatrix(tmp_path / "other.gguf", other)
    with pytest.raises(BadOption, match="no tensor of it is among the 1 there"):
        forecast(qwen3, Recipe(level="Q4_0", imatrix=tmp_path / "other.gguf"))


# ----------------------------------------------------------------------------- which source


def source(quant: str, *, here: bool) -> Source:
    path = Path(f"/models/{quant}.gguf") if here else None
    return Source(name="m", quant=quant, repo="o/m", file=f"{quant}.gguf", path=path)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([("F32", True), ("Q8_0", True), ("F16", False)], "F32"),
        ([("F32", False), ("Q8_0", True), ("F16", False), ("BF16", False)], "F16"),
        ([("Q8_0", True), ("Q4_0", True)], "Q8_0"),  # refused when it is planned
    ],
)
def test_the_source_is_exact_and_here_if_possible(
    monkeypatch: pytest.MonkeyPatch, found: list[tuple[str, bool]], expected: str
):
    sources = [source(quant, here=here) for quant, here in found]
    monkeypatch.setattr(names, "sources", lambda name: tuple(sources))
    monkeypatch.setattr(names, "resolve", lambda name: sources[0])
    monkeypatch.setattr(hub, "remote_header", lambda one: header_of("F16"))
    assert find_source("m").quant == expected


def header_of(quant: str) -> Header:
    """A header of one matrix of that type, as a range request brings it."""
    tensor = TensorInfo(name="token_embd.weight", shape=(32, 1), type=quant, offset=0, n_bytes=1)
    return Header(
        source="hf:o/m/m.gguf",
        version=3,
        metadata={"general.architecture": "bert"},
        tensors=(tensor,),
        header_bytes=1,
        file_bytes=None,
    )


def test_a_quantized_file_is_not_even_fetched(monkeypatch: pytest.MonkeyPatch):
    far = source("Q8_0", here=False)
    monkeypatch.setattr(names, "sources", lambda name: (far,))
    monkeypatch.setattr(names, "resolve", lambda name: far)
    monkeypatch.setattr(hub, "remote_header", lambda one: header_of("Q8_0"))
    with pytest.raises(BadOption, match=r"hf:o/m/m\.gguf is quantized already"):
        find_source("m")
    assert find_source("m", force=True) is far


# ----------------------------------------------------------------------------- the command


def test_the_command_reports(
    narrow: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    arguments = ["quantize", str(narrow), "q4_0", "-o", "out.gguf", "--threads", "1"]
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    cosine = report.pop("canary_cosine")
    assert 0.8 < cosine["min"] < cosine["mean"] < 1
    assert cosine["different_texts"] < 0.9
    assert report.pop("seconds") > 0
    n_bytes = Path("out.gguf").stat().st_size
    assert report == {
        "source": str(narrow),
        "source_quant": "F32",
        "source_n_bytes": narrow.stat().st_size,
        "file": "out.gguf",
        "format": "gguf-embed-quantize/1",
        "quant": "Q4_0",
        "n_bytes": n_bytes,
        "tensor_types": {"F32": 11, "Q4_0": 14, "Q8_0": 1},
        "fallbacks": [{"row_length": 96, "wanted": "Q6_K", "given": "Q8_0", "n_tensors": 1}],
    }
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"out.gguf: Q4_0, {n_bytes:,} bytes, ")
    assert [line.split()[0] for line in lines[1:]] == ["tensors", "fallback", "verified"]


def test_every_option_reaches_the_recipe(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[Recipe] = []

    def note(path: Path, recipe: Recipe) -> NoReturn:
        asked.append(recipe)
        raise BadOption("noted")

    monkeypatch.setattr(forecasting, "forecast", note)
    options = "--token-embedding-type Q8_0 --output-type F16 --pure --imatrix i.gguf --force"
    arguments = ["quantize", str(qwen3), "Q4_K", "-o", str(tmp_path / "o.gguf")]
    assert cli.main([*arguments, *options.split(), "--threads", "3"]) == 2
    assert asked == [
        Recipe(
            level="Q4_K_M",
            token_embedding_type="Q8_0",
            output_type="F16",
            pure=True,
            imatrix=Path("i.gguf"),
            force=True,
            n_threads=3,
        )
    ]


def test_the_command_refuses_in_one_line(
    qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / "o.gguf"
    assert cli.main(["quantize", str(qwen3), "Q4_X", "-o", str(target)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gguf-embed: no level is called 'Q4_X'; did you mean")
    assert err.count("\n") == 1
    assert not target.exists()
