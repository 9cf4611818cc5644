"""What the tests of partners share. Coroutines run without a plugin."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import numpy as np
import pytest

from gguf_embed import Embedder, Settings

TEXTS = ["a river", "", "the bread in the oven", "a river", "Über die Brücke"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A coroutine is run, as pytest-asyncio would."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True


@pytest.fixture(scope="session")
def minilm() -> Iterator[Embedder]:
    """The built-in model, itself."""
    with Embedder.open(settings=Settings(tune=False)) as embedder:
        yield embedder


@pytest.fixture(scope="session")
def direct(minilm: Embedder) -> np.ndarray:
    """The vectors of `TEXTS`."""
    return minilm.encode(TEXTS)
