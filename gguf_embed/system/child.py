"""Child processes: the only place that starts, talks to, times out and explains one.

A child is one of our own modules. It gets one job as a JSON line, and answers in JSON lines.

    with Child("gguf_embed.machine.selftest", {"weight_type": "Q8_0"}) as child:
        for answer in child.answers(timeout_s=120):
            ...
        child.ending.ok, child.ending.reason

    if __name__ == "__main__":  # in that module
        job = take_job()
        tell({"stage": "plain", "result": "ok"})

A `Worker` is one that takes further jobs, and may be started before there is the first: it reads
its modules meanwhile.

It imports what this process would, never a file of the user's current folder, and it ends when
this process does: its standard input is its lifeline.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_embed.system.closing import Closes

# Run by `python -I -c`: the parent's import path, then the module as if by -m.
_BOOT = """\
import json, runpy, sys
sys.path[:] = json.loads(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
_LAST_BYTES = 1 << 16  # of standard error that are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a child ended. `code` is its exit code, below 0 a signal; None: it was too slow."""

    code: int | None
    errors: str  # the end of its standard error
    timeout_s: float | None = None

    @property
    def ok(self) -> bool:
        """It ended by itself, with 0."""
        return self.code == 0

    @property
    def signal(self) -> str | None:
        """The name of the signal that ended it, such as "SIGSEGV"."""
        if self.code is None or self.code >= 0:
            return None
        with suppress(ValueError):
            return signal.Signals(-self.code).name
        return f"signal {-self.code}"

    @property
    def crashed(self) -> bool:
        """It died of its own native code, not of a kill, an exit code or a slow machine."""
        return self.signal in CRASH_SIGNALS or self.code in _WINDOWS_CRASHES

    @property
    def reason(self) -> str:
        """Why it failed, on one line; "" where it did not."""
        lines = [" ".join(line.split()) for line in self.errors.splitlines() if line.strip()]
        marks = ("ASSERT", "fatal", "Fatal", "what():")  # the last is an uncaught C++ exception's
        cause = next((line for line in lines if any(mark in line for mark in marks)), "")
        if self.code is None:
            return f"no answer in {self.timeout_s or 0:g} s"
        if name := self.signal:
            return f"{name} ({cause})" if cause else name
        if self.code:
            return cause or (lines[-1] if lines else f"exit code {self.code}")
        return ""


CRASH_SIGNALS = frozenset({"SIGILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGTRAP"})
_WINDOWS_CRASHES = frozenset({0xC000001D, 0xC0000005, 0xC0000409, 0x80000003, 3})


def lower_session(pid: int) -> None:
    """Give the session of that process the least share of the cores, where Linux can.

    Linux with `autogroup` shares the cores between sessions first, whatever the priorities of their
    processes: a child of least priority took twice what a busy program of another session got.
    """
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("19")


def _is_idle() -> bool:
    """Whether this process runs only while no other wants the cores, and so should its children."""
    return sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_IDLE


class Child(Closes):
    """A running child; closing kills what still runs. Used by one thread at a time."""

    def __init__(
        self, module: str, *jobs: object, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start `module` with its job, or none yet; more may be sent with `send`."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, json.dumps(_import_path()), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(environment or {})},
            start_new_session=(idle := _is_idle()),
        )
        if idle:
            lower_session(self._process.pid)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None  # once somebody waits for a limited time
        self._ending: Ending | None = None
        for job in jobs:
            self.send(job)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether there is no such process any more."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """End it; whoever reads its answers sees that."""
        self._process.kill()

    def send(self, job: object) -> None:
        """Hand over one more job. A child that has died says so by its ending."""
        assert self._process.stdin, "piped"
        with suppress(OSError, ValueError):  # ValueError: closed, since it has ended
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def lines(self, *, timeout_s: float | None = None) -> Generator[str]:
        """Lines of its standard output as they come, until it ends or has run `timeout_s`."""
        if timeout_s is None:
            yield from map(_text, self._output())
            self._finish(None)
            return
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, daemon=True, name="gguf-embed-child")
            self._reader.start()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self._process.kill()
                self._finish(timeout_s)
                return
            if line is None:
                self._finish(None)
                return
            yield _text(line)

    def answers(self, *, timeout_s: float | None = None) -> Iterator[dict[str, Any]]:
        """The JSON objects among `lines`; what native code prints besides is passed over."""
        for line in self.lines(timeout_s=timeout_s):
            with suppress(ValueError):
                answer: object = json.loads(line)
                if isinstance(answer, dict):
                    yield answer  # pyright: ignore[reportUnknownVariableType]

    @property
    def ending(self) -> Ending:
        """How it ended; waits for that."""
        if self._ending is None:
            self._finish(None)
        assert self._ending, "finished"
        return self._ending

    def close(self) -> None:
        """Kill it, if it still runs; nothing is left behind."""
        if self._ending is None:
            self._process.kill()
            self._finish(None)

    def _output(self) -> Iterator[bytes]:
        """Its lines, from wherever they are read."""
        if self._reader is not None:
            return iter(self._lines.get, None)
        assert self._process.stdout, "piped"
        return iter(self._process.stdout.readline, b"")

    def _read(self) -> None:
        assert self._process.stdout, "piped"
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _finish(self, timed_out_s: float | None) -> None:
        with suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        if self._reader is not None:
            self._reader.join()
        if self._process.stdout:
            self._process.stdout.read()  # a full pipe would keep it from ending
            self._process.stdout.close()
        code = self._process.wait()
        n_bytes = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, n_bytes - _LAST_BYTES))
        said = self._errors.read().decode("utf-8", "replace")
        self._errors.close()
        self._ending = Ending(
            code=None if timed_out_s is not None else code, errors=said, timeout_s=timed_out_s
        )


class Worker(Closes):
    """A child that does one job after the other. Where one ends it, the next gets a new child."""

    def __init__(self, module: str, *, environment: Mapping[str, str] | None = None) -> None:
        """Nothing is started yet. `module` tells `DONE` after each job."""
        self._module = module
        self._environment = environment
        self._child: Child | None = None
        self.ending = Ending(code=0, errors="")  # of the last job; 0 also where the child lives on

    def start(self) -> None:
        """Start the child before there is a job for it."""
        if self._child is None:
            self._child = Child(self._module, environment=self._environment)

    def answers(self, job: object, *, timeout_s: float) -> Iterator[dict[str, Any]]:
        """What it says to one job, until that is done or its process has ended: see `ending`."""
        self.start()
        assert self._child, "started"
        self._child.send(job)
        for answer in self._child.answers(timeout_s=timeout_s):
            if answer == DONE:
                self.ending = Ending(code=0, errors="")
                return
            yield answer
        self.ending = self._child.ending
        self._child = None

    def close(self) -> None:
        """End it."""
        if self._child is not None:
            self._child.close()
            self._child = None


DONE = {"done": True}  # what a worker tells after each job


def take_job() -> Any:
    """In the child: its job. From the first one on it ends when its parent does or closes it."""
    return _inbox.take()


def do_jobs(do: Callable[[Any], None]) -> None:
    """In the child: have `do` called with each job that comes from now on, until None comes.

    By the thread that reads them, which sees the parent's end only in between.
    """
    _inbox.have_done(do)


def tell(answer: Mapping[str, object]) -> None:
    """In the child: one answer to the parent."""
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def run_tool(
    command: Sequence[str], *, timeout_s: float | None = 10
) -> subprocess.CompletedProcess[str] | None:
    """Another program, with what it printed; None where it is absent or too slow."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def run_for_user(command: Sequence[str]) -> int | None:
    """Another program that has the terminal until it ends; its exit code, None if it is absent."""
    try:
        return subprocess.run(command, check=False).returncode
    except OSError:
        return None


class _Inbox:
    """In the child: what its parent sends, read by a thread of its own."""

    def __init__(self) -> None:
        self._kept: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._do: Callable[[Any], None] = self._kept.put
        self._reader: threading.Thread | None = None

    def take(self) -> Any:
        """The next that is kept."""
        if self._reader is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to explain
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        return self._kept.get()

    def have_done(self, do: Callable[[Any], None]) -> None:
        """See `do_jobs`."""
        self._do = do
        while (job := self.take()) is not None:  # kept before there was `do`
            do(job)

    def _read(self) -> None:
        # Not sys.stdin: a thread that waits inside it aborts Python's own exit.
        rest = b""
        with suppress(OSError, ValueError):
            while chunk := os.read(0, 1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    job = json.loads(line)
                    (self._kept.put if job is None else self._do)(job)
        os._exit(1)  # whatever native code is doing


_inbox = _Inbox()


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r\n")


def _import_path() -> list[str]:
    """This process's import path, without the user's current folder.

    A json.py there would otherwise run in our child.
    """
    package = Path(__file__).parents[2]
    here = Path.cwd()
    kept = [entry for entry in sys.path if entry and Path(entry) != here]
    return [*kept, *([] if str(package) in kept else [str(package)])]
