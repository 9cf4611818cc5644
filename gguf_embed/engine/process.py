"""The child process of an isolated engine, as several threads ask it at a time.

The thread that waits for an answer reads it, and those of the others meanwhile: an answer that is
alone wakes one thread, the one that wants it.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from gguf_embed.engine.barriers import waiting
from gguf_embed.engine.segments import Segments
from gguf_embed.engine.tokenizer import RunTooLong
from gguf_embed.errors import BadInput, BadModelFile, GgufEmbedError, NativeFailed
from gguf_embed.system.child import Child, Ending
from gguf_embed.system.closing import Closes

CLOSING_S: Final = 5.0
_READY: Final = 0  # in place of a request's number


class Died(Exception):
    """The child ended before it answered."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.reason or "it ended")
        self.reason = str(self)
        self.crashed = ending.crashed


class Process(Closes):
    """One child. `ask` may be called from several threads."""

    def __init__(self, job: object) -> None:
        environment = {"GGML_NO_BACKTRACE": "1", **waiting(os.environ)}
        self._child = Child("gguf_embed.engine.hosted", job, environment=environment)
        self.segments = Segments()
        self._read: Iterator[dict[str, Any]] = self._child.answers()
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()
        self._arrived = threading.Condition()  # around all below
        self._answers: dict[int, dict[str, Any]] = {}
        self._is_read = False  # by a thread that waits for an answer of its own
        self._n_waiting = 0
        self._death: Died | None = None
        self._for_main = ThreadPoolExecutor(1, "gguf-embed-isolated")

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._child.pid

    @property
    def death(self) -> Died | None:
        """How it ended, once it has."""
        with self._arrived:
            if self._death is None and not self._is_read and self._child.has_ended:
                self._death = Died(self._child.ending)
            return self._death

    def ready(self) -> dict[str, Any]:
        """What it says once, when the model is loaded or is not. Raises Died."""
        return self._answer(_READY)

    def ask(self, request: dict[str, object]) -> dict[str, Any]:
        """Its answer. Raises Died, and what the child raised."""
        number = next(self._numbers)
        with self._sending:
            self._child.send({"id": number, **request})
        answer = self._answer(number)
        if "error" in answer:
            raise _error(answer["error"], answer["message"])
        return answer

    def close(self) -> None:
        """Let it end, or end it; nothing is left behind."""
        with self._sending:
            self._child.send(None)
        with self._arrived:
            if not self._arrived.wait_for(lambda: not self._n_waiting, CLOSING_S):
                self._child.kill()
                self._arrived.wait_for(lambda: not self._n_waiting)
            if self._death is None:
                for _ in self._child.answers(timeout_s=CLOSING_S):
                    pass
                self._death = Died(self._child.ending)
        self._for_main.shutdown()
        self.segments.close()

    def _answer(self, number: int) -> dict[str, Any]:
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C may come there at any time, and what was read by then would be lost.
            return self._for_main.submit(self._awaited, number).result()
        return self._awaited(number)

    def _awaited(self, number: int) -> dict[str, Any]:
        with self._arrived:
            self._n_waiting += 1
            try:
                while (answer := self._answers.pop(number, None)) is None:
                    if self._death is not None:
                        raise self._death
                    if self._is_read:
                        self._arrived.wait()
                    else:
                        self._read_one()
            finally:
                self._n_waiting -= 1
                self._arrived.notify_all()  # one of the others reads on, or `close` goes on
        return answer

    def _read_one(self) -> None:
        """Keep the next answer for whoever waits for it."""
        self._is_read = True
        self._arrived.release()
        try:
            answer = next(self._read, None)
        finally:
            self._arrived.acquire()
            self._is_read = False
        if answer is None:
            self._death = Died(self._child.ending)
        else:
            self._answers[answer.get("id", _READY)] = answer
        if self._n_waiting > 1:
            self._arrived.notify_all()


def _error(name: str, message: str) -> Exception:
    """An error of the child as it would have been raised here."""
    kinds: dict[str, type[Exception]] = {
        "RunTooLong": RunTooLong,
        "BadModelFile": BadModelFile,
        "BadInput": BadInput,
    }
    kind = kinds.get(name, NativeFailed)
    assert issubclass(kind, (GgufEmbedError, RunTooLong))
    return kind(message)
