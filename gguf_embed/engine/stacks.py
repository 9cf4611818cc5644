"""Threads whose stacks are large enough for native code that recurses.

llama.cpp splits a text by std::regex, which recurses once per character of a match in some of its
patterns. The stack of an ordinary thread then ends after some ten thousand characters, and the
process with it. A stack is address space only: what is not touched takes no memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, TypeVar

_Result = TypeVar("_Result")

POOL_BYTES: Final = 64 << 20
# What any thread has: musl gives 128 KiB, macOS 512 KiB, glibc 8 MiB.
ANY_BYTES: Final = 96 << 10
_SLACK: Final = 1 << 20  # for Python's own frames
_PAGE: Final = 1 << 16

_changing = threading.Lock()  # threading.stack_size is one number for the whole process
_large = threading.Lock()  # one stack of any size at a time, so that their memory does not add up
_own = threading.local()


def stack_bytes() -> int:
    """Stack that native code may surely use in this thread."""
    return getattr(_own, "n_bytes", ANY_BYTES)


def stack_pool(n_threads: int, name: str, n_bytes: int = POOL_BYTES) -> ThreadPoolExecutor:
    """An executor whose threads have `n_bytes` of stack each."""
    pool = ThreadPoolExecutor(
        n_threads, thread_name_prefix=name, initializer=_remember, initargs=(n_bytes,)
    )
    # The executor makes a thread where none is idle, so all are made while none may go on.
    barrier = threading.Barrier(n_threads + 1)
    try:
        with _stack_size(n_bytes):
            for _ in range(n_threads):
                pool.submit(barrier.wait)
        barrier.wait()
    except BaseException:
        barrier.abort()
        pool.shutdown(wait=False)
        raise
    return pool


def call_with_stack(n_bytes: int, function: Callable[[], _Result]) -> _Result:
    """What `function` returns or raises, run in a thread with so much stack.

    Raises MemoryError where the system gives no such thread.
    """
    future: Future[_Result] = Future()

    def run() -> None:
        _remember(n_bytes)
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    with _large:
        thread = threading.Thread(target=run, name="gguf-embed-large-stack", daemon=True)
        try:
            with _stack_size(n_bytes):
                thread.start()
        except RuntimeError as error:  # "can't start new thread"
            raise MemoryError(f"no thread with {n_bytes >> 20} MiB of stack: {error}") from error
        thread.join()
    return future.result()


def _remember(n_bytes: int) -> None:
    _own.n_bytes = n_bytes


@contextmanager
def _stack_size(n_bytes: int) -> Generator[None]:
    """Threads that are started inside get so much stack, and a little more."""
    with _changing:
        before = threading.stack_size(-(-(n_bytes + _SLACK) // _PAGE) * _PAGE)
        try:
            yield
        finally:
            threading.stack_size(before)
