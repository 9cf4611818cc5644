"""Random mutants of tiny model files, opened through the command line: none may crash it.

    python benchmarks/mutants.py [n] [seed] [at one time] > mutants.json

Only mutants that pass the check of the header are opened. The command is run in a process that is
forked for each, so that its own death is seen, and two run at one time. What ended how is counted;
a mutant that ends one by a signal, by a traceback or by "this is a bug" is kept in the folder for
temporary files. Needs a POSIX system. 1,000 take about 20 minutes on two cores.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gguf_embed import cli
from gguf_embed.errors import BadModelFile
from gguf_embed.gguf.header import read_header
from gguf_embed.plan.mode import embed_mode
from gguf_embed.plan.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
tiny: Any = importlib.import_module("tiny")

LIMIT_S = 300
TRACEBACK = 99  # an exit code that the command never gives
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY, _ALIGNMENT = 8, 9, 32
_WORDS = (
    "", "x", "llama", "bert", "qwen3", "gpt2", "t5", "default", "gpt-4o", "gemma4", "whitespace",
    "tekken", "superbpe", "no_vocab", "rwkv", "plamo2", "linear", "yarn", "none", "longrope",
    "\x00",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class File:
    """A GGUF file taken apart. A value is (type, value), an array (9, (item type, items))."""

    metadata: dict[str, tuple[int, Any]]
    tensors: list[list[Any]]  # name, dims, type, offset
    data: bytearray


def read(raw: bytes) -> File:
    at = 8

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> bytes:
        nonlocal at
        n = take("Q")
        at += n
        return raw[at - n : at]

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            item = take("I")
            return item, [value(item) for _ in range(take("Q"))]
        return take(_FORMATS[kind])

    n_tensors, n_values = take("Q"), take("Q")
    metadata: dict[str, tuple[int, Any]] = {}
    for _ in range(n_values):
        key, kind = text().decode(), take("I")
        metadata[key] = (kind, value(kind))
    tensors = [
        [text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")]
        for _ in range(n_tensors)
    ]
    at += -at % _ALIGNMENT
    return File(metadata=metadata, tensors=tensors, data=bytearray(raw[at:]))


def written(file: File) -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def packed(kind: int, value: Any) -> bytes:
        if kind == _STRING:
            return text(value)
        if kind == _ARRAY:
            item, items = value
            head = struct.pack("<IQ", item, len(items))
            return head + b"".join(packed(item, each) for each in items)
        try:
            return struct.pack("<" + _FORMATS[kind], value)
        except OverflowError:  # a float of 64 bits made one of 32
            return struct.pack("<" + _FORMATS[kind], math.copysign(math.inf, value))

    raw = b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(file.metadata))
    for key, (kind, value) in file.metadata.items():
        raw += text(key.encode()) + struct.pack("<I", kind) + packed(kind, value)
    for name, dims, kind, offset in file.tensors:
        raw += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        raw += struct.pack("<IQ", kind, offset)
    return raw + bytes(-len(raw) % _ALIGNMENT) + bytes(file.data)


def number(kind: int, value: Any, draw: random.Random) -> Any:
    """Another value that fits the type."""
    if kind == 7:
        return not value
    if kind in (6, 12):
        return draw.choice([0.0, -1.0, float("nan"), float("inf"), 1e-45, 3e38, value * 2, -value])
    bits = 8 * struct.calcsize(_FORMATS[kind])
    low, high = (
        (0, 2**bits - 1) if kind in (0, 2, 4, 10) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    near = [0, 1, 2, 3, value + 1, value - 1, value * 2, value // 2, draw.randrange(64), high, low]
    return max(low, min(high, draw.choice(near)))


def mutate(file: File, draw: random.Random) -> str:
    """Change one thing; returns what kind of thing."""
    keys = list(file.metadata)
    key = draw.choice(keys)
    kind, value = file.metadata[key]
    tensor = draw.choice(file.tensors)
    match draw.randrange(10):
        case 0:
            del file.metadata[key]
            return "key removed"
        case 1:
            file.metadata[key] = (4, draw.randrange(100))
            return "key of another type"
        case 2 if tensor[1]:
            place = draw.randrange(len(tensor[1]))
            tensor[1][place] = draw.choice([1, tensor[1][place] + 1, tensor[1][place] // 2, 32])
            return "tensor of another shape"
        case 3:
            tensor[2] = draw.choice([0, 1, 2, 8, 12, 14, 24, 26, 28, 30])
            return "tensor of another type"
        case 4:
            other = draw.choice(file.tensors)
            tensor[0], other[0] = other[0], tensor[0]
            return "tensors exchanged"
        case 5:
            start = draw.randrange(len(file.data))
            n = min(draw.choice([4, 64, 4096, len(file.data)]), len(file.data) - start)
            fill = draw.choice([b"\0", b"\xff", struct.pack("<f", 1e30), struct.pack("<f", -1e-30)])
            file.data[start : start + n] = (fill * (n // len(fill) + 1))[:n]
            return "weights overwritten"
        case 6:
            file.tensors.remove(tensor)
            return "tensor removed"
        case _ if kind == _STRING:
            file.metadata[key] = (kind, draw.choice(_WORDS).encode())
            return "another word"
        case _ if kind == _ARRAY:
            item, items = value
            items = list(items)
            place = draw.randrange(len(items)) if items else 0
            what = draw.randrange(3)
            if what == 0:
                items = items[:place]
            elif items and item == _STRING:
                items[place] = draw.choice([b"", b"\n", b" ", b"\xff", draw.choice(items)])
            elif items and item in _FORMATS:
                items[place] = number(item, items[place], draw)
            file.metadata[key] = (kind, (item, items))
            return "array changed"
        case _:
            file.metadata[key] = (kind, number(kind, value, draw))
            return "number changed"


def passes(path: Path) -> bool:
    try:
        embed_mode(read_header(path), None, Settings())
    except BadModelFile:
        return False
    return True


def opened(path: Path) -> tuple[int, str]:
    """Exit code of the command, below 0 a signal, and what it wrote to standard error."""
    with tempfile.TemporaryFile() as errors:
        process = os.fork()
        if process == 0:
            _command(path, errors.fileno())
        status = _waited(process)
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    if status is None:
        return -signal.SIGKILL, f"more than {LIMIT_S} s"
    return os.waitstatus_to_exitcode(status), said


def _command(path: Path, errors: int) -> NoReturn:
    """In the fork: the command, and no way out but its exit code."""
    code = TRACEBACK
    try:
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        command = ["embed", "--no-tune", "--quiet", "--threads", "1", "--model", str(path)]
        code = cli.main([*command, "--text", "a cat", "--text", "the dog sat", "-o", "-"])
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _waited(process: int) -> int | None:
    """Its wait status; None where it took too long and was killed."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def crashed(code: int, said: str) -> bool:
    """Whether the user met native code's death, a traceback, or an error that nobody wrote."""
    return code < 0 or code == TRACEBACK or "Traceback" in said or "this is a bug" in said


def cause(code: int, said: str) -> str:
    """What ended it, without names and numbers."""
    if code == 0:
        return "vectors"
    line = (said.strip().splitlines() or ["nothing said"])[-1 if code < 0 else 0]
    line = re.sub(r"\S*/\S+", "FILE", line)
    return f"exit {code}: {re.sub(r'[0-9]+', 'N', line)[:160]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One that passes the check of the header."""

    number: int  # of all that were drawn
    seed: str  # what it was made from
    kinds: list[str]
    raw: bytes


def mutants(folder: Path, draw: random.Random) -> Iterator[Mutant]:
    """Without end, always the same for one seed."""
    seeds: list[tuple[str, bytes]] = []
    writers: dict[str, Callable[..., Any]] = {
        "qwen3": tiny.write_qwen3,
        "qwen2": tiny.write_qwen2_bidirectional,
        "bert": tiny.write_bert,
        "xlmr": tiny.write_xlmr,
    }
    for name, write in writers.items():
        path = write(folder / f"{name}.gguf").path
        seeds.append((name, path.read_bytes()))
        code, said = opened(path)
        assert code == 0, f"{name} as written must open: {said}"
    path = folder / "drawn.gguf"
    for number in itertools.count(1):
        name, raw = draw.choice(seeds)
        file = read(raw)
        kinds = [mutate(file, draw) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
        with contextlib.suppress(struct.error, TypeError):
            path.write_bytes(written(file))
            if passes(path):
                yield Mutant(number=number, seed=name, kinds=kinds, raw=path.read_bytes())


def main(n: str = "100", seed: str = "0", n_at_once: str = "2") -> None:
    ends: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    crashes: list[dict[str, Any]] = []
    n_tried, started = 0, time.monotonic()

    def attempt(mutant: Mutant) -> tuple[Mutant, int, str]:
        path = Path(folder) / f"mutant-{seed}-{mutant.number}.gguf"
        path.write_bytes(mutant.raw)
        try:
            code, said = opened(path)
            if crashed(code, said):
                shutil.copy(path, tempfile.gettempdir())
            return mutant, code, said
        finally:
            path.unlink()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(int(n_at_once)) as pool:
        os.environ["GGUF_EMBED_HOME"] = str(Path(folder) / "home")
        drawn = itertools.islice(mutants(Path(folder), random.Random(int(seed))), int(n))
        running: deque[Future[tuple[Mutant, int, str]]] = deque()
        for mutant in itertools.chain(drawn, [None] * int(n_at_once)):
            if mutant is not None:
                n_tried = mutant.number
                running.append(pool.submit(attempt, mutant))
                if len(running) <= int(n_at_once):
                    continue
            if not running:
                break
            done, code, said = running.popleft().result()
            ends[cause(code, said)] += 1
            by_kind.update(set(done.kinds))
            if crashed(code, said):
                crashes.append(
                    {
                        "number": done.number,
                        "seed": done.seed,
                        "kinds": done.kinds,
                        "code": code,
                        "said": said[-800:],
                    }
                )
            if ends.total() % 50 == 0:
                print(ends.total(), len(crashes), file=sys.stderr, flush=True)
    result = {
        "opened": ends.total(),
        "refused_by_header": n_tried - ends.total(),
        "crashes": crashes,
        "seconds": round(time.monotonic() - started),
        "kinds": dict(by_kind.most_common()),
        "ends": dict(ends.most_common()),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
