"""Our own ggml backend: each operation against float64 and ggml's CPU backend, and whole models.

Everything that loads it runs in a child process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_embed.catalog.catalog import builtin_path
from gguf_embed.native import accelerator

pytestmark = pytest.mark.native

TESTS = Path(__file__).parent
NATIVE = TESTS.parent / "native"
ON = {**os.environ, accelerator.SWITCH: "1", "PYTHONPATH": str(TESTS)}

HALF_TYPES = ("F16", "BF16")
FLOAT_TYPES = ("F32", *HALF_TYPES)
INTEGER_TYPES = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)
# Error of a product as a share of the lengths of its two vectors. Errors of many values cancel.
BOUNDS = {"F32": 4e-6} | dict.fromkeys(HALF_TYPES, 6e-5) | dict.fromkeys(INTEGER_TYPES, 2e-4)
SHORT_BOUND = 5e-4  # of integers, where a vector has fewer than 256 values
RULED_BOUND = 8e-5  # of 16 bits, where one number rules a row, which then has 20,000 steps

# Instruction sets, and the flag by which Linux says that a CPU has one.
SETS = {
    "AVX2": "avx2",
    "AVX-VNNI": "avx_vnni",
    "AVX-512": "avx512dq",
    "AVX-512 VNNI": "avx512_vnni",
    "AMX": "amx_int8",
}
HERE = [name for name, flag in SETS.items() if flag in accelerator.cpu_flags()]

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """native/build.py; skips where there can be no accelerator."""
    spec = importlib.util.spec_from_file_location("build_accelerator", NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.check_requirements()
    except module.NotBuilt as reason:
        pytest.skip(str(reason))
    return module


@pytest.fixture(scope="module")
def library(build: ModuleType) -> Path:
    """The plug-in where the package looks for it, made of these sources."""
    path = accelerator.library_path(build.LLAMA_CPP_PYTHON)
    # Not its folder of bytecode: a build in the middle of the tests gives others a new build id.
    newest = max(p.stat().st_mtime for p in NATIVE.iterdir() if p.is_file())
    if not path.exists() or path.stat().st_mtime < newest:
        build.build(path.parent)
    return path


@pytest.fixture(scope="module", params=HERE or ["AVX2"])
def kernel(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this CPU has, one after the other."""
    return request.param


@pytest.fixture(scope="module")
def ask(library: Path, kernel: str) -> Iterator[Ask]:
    """Runs a case in a child that holds the accelerator; skips where this CPU has no kernel."""
    command = [sys.executable, str(TESTS / "accelerator_child.py"), kernel]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ON
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        started = json.loads(child.stdout.readline())
        if started["kernel"] is None:
            child.stdin.close()
            pytest.skip(started["remark"])
        assert started["kernel"] == kernel

        def run(**case: Any) -> dict[str, Any]:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps(case) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
            assert line, f"the child died of {case}"
            return json.loads(line)

        yield run
        child.stdin.close()


# -------------------------------------------------------------------------------------- products


def block_of(weight: str) -> int:
    """Numbers that a quantization keeps together."""
    return 256 if weight.endswith("K") or weight == "IQ4_XS" else 32


@pytest.mark.parametrize("weight", BOUNDS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    blocks=st.integers(1, 6),
    threads=st.integers(1, 3),
    outlier=st.sampled_from([1, 300]),
    seed=st.integers(0, 2**32 - 1),
    parts=st.fixed_dictionaries(dict.fromkeys(("bias", "gelu", "residual"), st.booleans())),
)
def test_products(ask: Ask, weight: str, blocks: int, parts: dict[str, bool], **case: Any):
    inner = blocks * block_of(weight)
    got = ask(run="product", type=weight, inner=inner, padding=blocks % 3, **case, **parts)
    assert got["supported"]
    assert got["same"], "a row alone differs from the row in a batch"
    short = weight in INTEGER_TYPES and inner < 256
    ruled = weight in HALF_TYPES and case["outlier"] > 1
    bound = SHORT_BOUND if short else RULED_BOUND if ruled else BOUNDS[weight]
    assert got["error"] <= bound
    if weight in INTEGER_TYPES and inner >= 256 and case["outlier"] == 1:
        assert got["error"] <= got["theirs"], "ggml is closer to the exact product"


@pytest.mark.parametrize("weight", FLOAT_TYPES)
def test_inner_sizes_that_fill_no_vector(ask: Ask, weight: str):
    for inner in (1, 7, 33, 301):
        got = ask(run="product", type=weight, rows=9, columns=19, inner=inner, seed=inner)
        assert (got["supported"], got["same"]) == (True, True)
        assert got["error"] <= BOUNDS[weight]


@pytest.mark.parametrize("weight", BOUNDS)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    blocks=st.integers(1, 4),
    threads=st.integers(1, 3),
    first=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_gate_and_its_product_in_one_step(ask: Ask, weight: str, blocks: int, **case: Any):
    inner = blocks * block_of(weight)
    got = ask(run="gate", type=weight, inner=inner, **case)
    assert got["as_three"], "in one step the result is another than in three"
    assert got["same"], "a row alone differs from the row in a batch"
    assert max(got["error"], got["of_products"]) <= max(BOUNDS[weight], SHORT_BOUND)


def test_a_gate_of_another_type(ask: Ask):
    got = ask(run="gate", type="Q8_0", other_type="F16", rows=30, columns=20, inner=64, seed=1)
    assert (got["as_three"], got["same"]) == (True, True)
    assert got["error"] <= SHORT_BOUND


@pytest.mark.parametrize("weight", ["F32", "F16", "Q8_0"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 1500),
    of=st.lists(st.sampled_from([0, 1]), min_size=3, max_size=6),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_in_turn(ask: Ask, weight: str, **case: Any):
    assert ask(run="products_in_turn", type=weight, **case)["same"]


# ------------------------------------------------------------------------------------- attention


def visible_by(lengths: list[int], *, causal: bool, prefix: int, window: int) -> list[list[int]]:
    """Which cells each row of some sequences sees: the prefix is everybody's."""
    n = sum(lengths)
    visible = np.zeros((n, prefix + n), int)
    start = 0
    for length in lengths:
        for i in range(length):
            row = start + i
            visible[row, :prefix] = 1
            first = max(0, i - window) if window else 0
            last = i + 1 if causal else min(length, i + window + 1) if window else length
            visible[row, prefix + start + first : prefix + start + last] = 1
        start += length
    return visible.tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    causal=st.booleans(),
    prefix=st.sampled_from([0, 0, 1, 20]),
    window=st.sampled_from([0, 0, 3, 17]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    dim=st.sampled_from([16, 32, 48, 64, 80, 128]),
    threads=st.integers(1, 3),
    half=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention_within_sequences(
    ask: Ask,
    lengths: list[int],
    causal: bool,
    prefix: int,
    window: int,
    heads: tuple[int, int],
    **case: Any,
):
    visible = visible_by(lengths, causal=causal, prefix=prefix, window=window)
    alone = []
    start = 0
    for length in lengths:
        rows = list(range(start, start + length))
        alone.append((rows, [*range(prefix), *(prefix + row for row in rows)]))
        start += length
    got = ask(
        run="attention", n_head=heads[0], n_kv_head=heads[1], visible=visible, alone=alone, **case
    )
    assert got["error"] <= got["halves"] + 1e-5  # queries and keys are int16
    # ggml adds values that are halves as halves, which keep eleven bits.
    assert got["to_ggml"] <= (0.05 if case["half"] else got["halves"] + 1e-5)
    assert got["same"], "a sequence alone differs from the sequence in a batch"


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 40),
    n_cells=st.integers(1, 70),
    share=st.sampled_from([0.05, 0.5, 0.95]),
    added=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention_under_any_mask(
    ask: Ask, n: int, n_cells: int, share: float, added: bool, seed: int
):
    """Rows that see nothing get zeros, as ggml gives them."""
    visible = np.random.default_rng(seed).random((n, n_cells)) < share
    got = ask(
        run="attention",
        n_head=4,
        n_kv_head=2,
        dim=32,
        value_dim=64,
        visible=visible.astype(int).tolist(),
        added=added,
        seed=seed,
    )
    assert got["error"] <= got["halves"] + 1e-5
    assert got["to_ggml"] <= 0.05


# ------------------------------------------------------------------------------ small operations


@pytest.mark.parametrize(
    "op", ["add", "add_row", "mul", "gelu", "swiglu", "cast", "norm", "rms_norm"]
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 300)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_small_operations(ask: Ask, op: str, shape: tuple[int, int, int], threads: int, seed: int):
    got = ask(run="small", op=op, shape=shape, threads=threads, seed=seed)
    assert got["supported"]
    bound = 0 if op in ("add", "add_row", "mul", "cast") else 1e-5
    assert got["error"] <= bound
    assert got["to_ggml"] <= (4e-3 if op == "gelu" else bound)  # ggml's is a table of halves


def test_a_norm_of_numbers_that_are_nearly_the_same(ask: Ask):
    got = ask(run="small", op="norm", shape=(3, 11, 2), threads=1, seed=252)
    assert max(got["error"], got["to_ggml"]) <= 1e-5


def test_a_cast_of_four_dimensions(ask: Ask):
    got = ask(run="small", op="cast", shape=(2, 3, 5, 32), threads=2, seed=1)
    assert (got["supported"], got["error"]) == (True, 0)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.integers(1, 300),
    heads=st.integers(1, 3),
    dims=st.sampled_from([(2, 2), (16, 16), (34, 34), (64, 64), (80, 32), (128, 128)]),
    longest=st.sampled_from([1, 40, 40_000]),
    base=st.sampled_from([1e4, 1e6]),
    scale=st.sampled_from([1.0, 0.25]),
    magnitude=st.sampled_from([1.0, 1.5]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    parts=st.fixed_dictionaries(dict.fromkeys(("side_by_side", "factors", "inner"), st.booleans())),
)
def test_pairs_rotated_by_positions(
    ask: Ask, dims: tuple[int, int], longest: int, parts: dict[str, bool], **case: Any
):
    got = ask(run="rotation", dim=dims[0], rotated=dims[1], longest=longest, **parts, **case)
    assert got["supported"]
    assert got["to_ggml"] <= 4e-6  # which may multiply and add in one
    assert got["error"] <= 1e-5 + 1e-6 * longest  # an angle is a float32


@pytest.mark.parametrize("threads", [1, 2])
def test_rotations_by_other_angles_in_one_graph(ask: Ask, threads: int):
    assert ask(run="rotations", threads=threads, seed=threads)["same"]


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cells=st.integers(1, 60),
    rows=st.integers(1, 60),
    n=st.integers(1, 300),
    half=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_that_go_to_a_cache(ask: Ask, cells: int, rows: int, **case: Any):
    got = ask(run="set_rows", cells=cells, rows=min(cells, rows), **case)
    assert (got["supported"], got["same"]) == (True, True)


PLAIN = (
    *("a product, plain", "attention, plain", "attention, float32 sums", "a sum, plain"),
    *("a rotation, plain", "rows to a cache, plain"),
)


@pytest.mark.parametrize("what", PLAIN)
def test_the_plain_form_of_what_is_refused_is_taken(ask: Ask, what: str):
    assert ask(run="refused", what=what)["taken"]


@pytest.mark.parametrize(
    "what",
    [
        "a product with a precision",
        "a product with a hint",
        "a batch of products",
        "one matrix for a batch",
        "weights with gaps",
        "a product of halves",
        "a type without a kernel",
        "attention with ALiBi",
        "attention with a soft cap",
        "attention with sinks",
        "attention in half precision",
        "attention without a mask",
        "attention of odd heads",
        "attention over quantized cells",
        "attention of two streams",
        "a sum that repeats values",
        "a sum of halves",
        "another activation",
        "GELU by the error function",
        "a gated GELU",
        "SwiGLU in one tensor",
        "a cast to another type",
        "a norm of columns",
        "a transposed row",
        "a rotation that is interpolated",
        "a rotation by several positions",
        "a rotation of halves",
        "rows of halves to a cache",
        "rows to a cache by short numbers",
        "rows to a quantized cache",
    ],
)
def test_what_is_not_covered_is_refused(ask: Ask, what: str):
    assert not ask(run="refused", what=what)["taken"]


# ----------------------------------------------------------------------------------- whole models


def vectors_of(model: Path, out: Path, kernel: str) -> tuple[dict[str, Any], Any]:
    command = [sys.executable, str(TESTS / "accelerator_vectors.py"), str(model), str(out), kernel]
    done = subprocess.run(command, env=ON, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), np.load(out)


def cosines(a: Any, b: Any) -> Any:
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    b = b / np.linalg.norm(b, axis=1, keepdims=True)
    return (a * b).sum(axis=1)


def test_the_builtin_model(library: Path, ask: Ask, kernel: str, tmp_path: Path):
    """To the bit the same in any company, and closer to the float32 model than ggml is."""
    from golden.compare import load

    told, ours = vectors_of(builtin_path(), tmp_path / "ours.npy", kernel)
    assert told["kernel"] == kernel
    assert all(told["same"].values()), told["same"]
    told, theirs = vectors_of(builtin_path(), tmp_path / "theirs.npy", "off")
    assert told["kernel"] is None
    whole = [row for row, ids in enumerate(load().ids[::4]) if len(ids) < 256]
    exact = load().vectors[::4][whole]
    assert len(whole) > 40
    mine, ggmls = cosines(ours[whole], exact), cosines(theirs[whole], exact)
    assert mine.min() > ggmls.min()  # so the model did run on it
    assert np.median(mine) > np.median(ggmls)


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_causal_model(library: Path, ask: Ask, kernel: str, tmp_path: Path, quant: str):
    path = tmp_path / "qwen3.gguf"
    tiny.write_qwen3(path, outtype=quant)
    told, ours = vectors_of(path, tmp_path / "ours.npy", kernel)
    assert all(told["same"].values()), told["same"]
    _, theirs = vectors_of(path, tmp_path / "theirs.npy", "off")
    assert not np.array_equal(ours, theirs), "the model did not run on the accelerator"
    assert cosines(ours, theirs).min() > (0.99999 if quant in FLOAT_TYPES else 0.995)


# --------------------------------------------------------------------- what is loaded, and when


def test_the_environment_keeps_it_out(monkeypatch: pytest.MonkeyPatch, library: Path):
    version = library.stem.rpartition("-")[2]
    assert accelerator.why_absent(version) == ""
    assert library.name in accelerator.identity(version)
    monkeypatch.setenv(accelerator.SWITCH, "0")
    got = accelerator.load(version, object())
    assert got.kernel is None
    assert accelerator.SWITCH in got.remark
    assert accelerator.identity(version) == ""


def test_another_version_is_refused_with_a_remark(library: Path):
    got = accelerator.load("0.3.99", object())
    assert got.kernel is None
    assert "0.3.99" in got.remark
    assert library.name in got.remark
    assert "install.py" in got.remark


class Refuses:
    """ggml, to which nothing is good enough."""

    def __init__(self) -> None:
        self.ggml_backend_load = lambda _: None


def test_ggmls_refusal_is_a_remark(library: Path):
    version = library.stem.rpartition("-")[2]
    got = accelerator.load(version, Refuses())
    assert got.kernel is None
    assert library.name in got.remark


def test_its_file_belongs_to_the_build_id(library: Path):
    code = "from gguf_embed.native import library; print(library.build_id())"

    def build_id(switch: str) -> str:
        environment = {**ON, accelerator.SWITCH: switch}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert build_id("0") != build_id("1")


def test_it_is_not_compiled_for_another_version(build: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "version", lambda _: "0.3.99")
    with pytest.raises(build.NotBuilt, match=r"0\.3\.99"):
        build.build(Path("/nowhere"))


def test_a_compiler_without_openmp_is_told_so(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiler = tmp_path / "clang++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *omp.h*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.NotBuilt, match=r"without OpenMP: install it .* or set CXX="):
        build.build(tmp_path)


@pytest.fixture(scope="module")
def own_tests(
    build: ModuleType, library: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What the kernels' test program says of each instruction set in the library."""
    program = build.build_test_program(tmp_path_factory.mktemp("program"), [library])
    said = subprocess.run([program], capture_output=True, text=True, check=False).stdout
    print(said)
    return dict(line.split(": ", 1) for line in said.splitlines())


@pytest.mark.parametrize("name", SETS)
def test_the_kernels_pass_their_own_tests(own_tests: dict[str, str], name: str):
    said = own_tests.get(name, "not tested, and not compiled here")
    assert said.startswith("not tested") == (name not in HERE or name not in own_tests)
    if said.startswith("not tested"):
        pytest.skip(f"{name}: {said}; benchmarks/emulated_cpus.py tests it")
    assert said.startswith("0 failures")


@pytest.mark.parametrize("names", [("AVX2", "AVX-VNNI"), ("AVX-512", "AVX-512 VNNI", "AMX")])
def test_vectors_of_one_length_give_the_same_bits(
    own_tests: dict[str, str], names: tuple[str, ...]
):
    digests = {own_tests[name].partition("digest ")[2] for name in names if name in HERE}
    assert len(digests) <= 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_the_kernels_touch_no_foreign_memory(build: ModuleType):
    assert build.run_test_program(sanitize=True) == 0
