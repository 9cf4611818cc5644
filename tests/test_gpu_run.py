"""The script for a GPU machine: its time, its report, what it carries, how it finds CUDA."""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.catalog import catalog
from gguf_embed.gguf import layout
from gguf_embed.gguf.header import read_header

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "gpu"))

import cuda_build
import pack
import random_models
import run
import steps

seconds = st.floats(0, 600, allow_nan=False)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=8), seconds)
def test_steps_never_get_more_time_than_there_is(pairs: list[tuple[float, float]], left: float):
    planned = [run.Step(name="s", least_s=min(p), most_s=max(p)) for p in pairs]
    for index, step in enumerate(planned):
        given_s = run.limit_s(planned, index, left)
        if given_s is None:
            assert step.least_s > left
            continue
        assert step.least_s <= given_s <= min(step.most_s, left)
        later_s = sum(later.least_s for later in planned[index + 1 :])
        assert given_s == step.least_s or left - given_s >= later_s - 1e-6
        left -= given_s


def test_the_build_leaves_time_for_the_steps_after_it():
    left = 560.0
    given_s = run.limit_s(run.STEPS, run.STEPS.index(run.BUILD), left)
    assert given_s is not None
    assert given_s > 300
    least_s = sum(step.least_s for step in run.STEPS[run.STEPS.index(run.BUILD) + 1 :])
    assert left - given_s >= least_s


@pytest.mark.slow
def test_what_a_step_printed_counts_also_where_it_was_killed(tmp_path: Path):
    code = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('@{"a": 1}')
print("noise", flush=True)
print('@{"b": ', end="", flush=True)
print("why", file=sys.stderr, flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    result = run.run_step([sys.executable, "-c", code], dict(os.environ), tmp_path / "log", 1.0)
    assert time.monotonic() - started < 20
    assert (result["outcome"], result["parts"]) == ("out of time", [{"a": 1}])
    assert result["error"] == "why\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_step_that_lacks_a_package_is_left_out(tmp_path: Path):
    code = f"import sys; print('no torch here', file=sys.stderr); sys.exit({steps.NOT_HERE})"
    result = run.run_step([sys.executable, "-c", code], dict(os.environ), tmp_path / "log", 10)
    assert result["outcome"] == "left out: no torch here"
    assert "error" not in result
    assert run.outcome(1, "") == "failed (1)"
    with pytest.raises(SystemExit) as end:
        steps.need("json", "no_such_package")
    assert end.value.code == run.NOT_HERE


def test_the_report_is_whole_after_each_step(tmp_path: Path):
    report = run.Report(tmp_path / "gpu.json", budget_s=1)
    for name in ("facts", "doctor"):
        report.add(name, outcome="ok", parts=[])
        kept = json.loads((tmp_path / "gpu.json").read_text())
        assert name in kept["steps"]
    assert kept["budget_s"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("81559 MiB\n1 MiB\n", [81559, 1]), ("563", [563]), ("[N/A]\n", []), ("", [])],
)
def test_memory_is_read_off_nvidia_smi(text: str, numbers: list[int]):
    assert steps.mib_numbers(text) == numbers


def test_only_what_a_cuda_build_compiles_travels():
    taken = (
        "CMakeLists.txt",
        "src/llama.cpp",
        "ggml/CMakeLists.txt",
        "ggml/src/ggml.c",
        "ggml/src/ggml-cpu/arch/x86/quants.c",
        "ggml/src/ggml-cuda/template-instances/mmq-instance-q4_k.cu",
    )
    left = (
        "models/ggml-vocab-qwen2.gguf",
        "tools/server/server.cpp",
        "ggml/src/ggml-vulkan/ggml-vulkan.cpp",
        "tests/test-backend-ops.cpp",
        "gguf-py/gguf/constants.py",
    )
    assert all(map(pack.is_compiled, taken))
    assert not any(map(pack.is_compiled, left))


def test_the_parts_of_cuda_may_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """nvcc in a toolkit without cuBLAS, which PyTorch's wheels have."""
    toolkit, wheels = tmp_path / "cuda", tmp_path / "wheels"
    for path in (
        toolkit / "bin/nvcc",
        toolkit / "lib64/libcudart.so",
        toolkit / "lib64/stubs/libcuda.so",
        wheels / "lib/libcublas.so.13",
        wheels / "lib/libcublasLt.so.13",
        wheels / "include/cublas_v2.h",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    cuda = cuda_build.find_cuda([toolkit, wheels])
    assert cuda.nvcc == toolkit / "bin/nvcc"
    command = cuda_build.configure_command(Path("s"), Path("b"), cuda, "90", ["-DMORE=1"])
    assert f"-DCUDA_cublas_LIBRARY={wheels}/lib/libcublas.so.13" in command
    assert f"-DCUDA_cuda_driver_LIBRARY={toolkit}/lib64/stubs/libcuda.so" in command
    assert f"-DCMAKE_CUDA_FLAGS=-isystem {wheels}/include" in command
    assert {"-DCMAKE_CUDA_ARCHITECTURES=90-real", "-DMORE=1"} <= set(command)
    assert cuda_build.library_path(cuda) == f"{toolkit}/lib64:{wheels}/lib:/before"
    (toolkit / "include").mkdir()
    (toolkit / "include/cublas_v2.h").touch()
    assert cuda_build.find_cuda([toolkit, wheels]).include is None
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="no nvcc"):
        cuda_build.find_cuda([wheels])


def test_what_no_embedding_model_needs_is_left_out(tmp_path: Path):
    folder = tmp_path / "ggml/src/ggml-cuda/template-instances"
    folder.mkdir(parents=True)
    attention = folder / "fattn-mma-f16-instance-ncols1_1-ncols2_16.cu"
    attention.write_text(
        "DECL_FATTN_MMA_F16_CASE(64, 64, 1, 16);\nDECL_FATTN_MMA_F16_CASE(576, 512, 1, 16);\n"
    )
    for name in ("IQ1_S", "Q4_K"):
        (folder / f"mmq-instance-{name}.cu").write_text(f"DECL_MMQ_CASE(GGML_TYPE_{name});\n")
    assert (cuda_build.trim(tmp_path), cuda_build.trim(tmp_path)) == (2, 0)
    assert attention.read_text() == "DECL_FATTN_MMA_F16_CASE(64, 64, 1, 16);\n"
    assert "DECL" not in (folder / "mmq-instance-IQ1_S.cu").read_text()
    assert "DECL" in (folder / "mmq-instance-Q4_K.cu").read_text()
    stubs = (folder / "mmq-instance-left-out.cu").read_text()
    assert "caseILi576ELi512ELi1ELi16EEvR" in stubs
    assert "caseIL9ggml_type19E" in stubs


def test_the_first_error_of_a_build_is_named():
    log = "\n".join([*map(str, range(50)), "x.cu(3): error: no", *"abcdefghijk"])
    assert cuda_build.first_error(log).splitlines() == ["x.cu(3): error: no", *"abcdefg"]
    assert cuda_build.first_error("a\nb") == "a\nb"


@pytest.mark.parametrize("level", sorted(random_models.FILE_TYPES))
def test_a_quick_random_model_is_laid_out_like_a_real_one(tmp_path: Path, level: str):
    card = steps.small_card("qwen3-embedding-0.6b")
    path = tmp_path / "model.gguf"
    random_models.write(card, path, level)
    header = read_header(path)
    assert header.quant == level
    expected = layout.tensors(card.shape, level)
    assert [(t.name, t.shape, t.type) for t in header.tensors] == [
        (t.name, t.shape, t.type) for t in expected
    ]
    ends = [tensor.offset for tensor in header.tensors]
    assert all(a < b for a, b in pairwise(ends))


def test_the_least_cosine_is_that_of_the_worst_row():
    a = np.array([[1, 0], [1, 1]], np.float32)
    b = np.array([[2, 0], [1, 0]], np.float32)
    assert steps.least(a, b) == pytest.approx(0.5**0.5, abs=1e-6)
    assert np.isnan(steps.least(a, np.full_like(a, np.nan)))


def test_every_step_names_what_steps_can_do():
    for step in run.STEPS:
        name, *arguments = step.command
        assert step is run.BUILD or name in steps.STEPS
        assert all(catalog.find(each) for each in arguments[:1])


def test_a_static_cxx_library_is_seen(tmp_path: Path):
    (tmp_path / "libllama.so").write_bytes(b"\x7fELF libgcc_s.so.1 libc.so.6")
    found = cuda_build.shared_cxx(tmp_path)
    assert found is None or found.name == "libstdc++.so.6"
    (tmp_path / "libllama.so").write_bytes(b"\x7fELF libstdc++.so.6 libgcc_s.so.1")
    assert cuda_build.shared_cxx(tmp_path) is None
