"""A bulk job on the machines of a Ray cluster: the shards and the manifest are those of `Job`.

    cut -> known? -> a free worker: tokenize, compute, encode -> in order: file, then its line

The driver reads and writes. Each machine, or each of its GPUs, has one worker, which holds the
model. A worker that dies costs what it was computing, which another one does; a machine that joins
gets a worker.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# Types are checked where Ray is not installed, and what it defines is unknown then.

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gguf_embed.errors import BadOption, GgufEmbedError, NativeFailed
from gguf_embed.io.shards import ShardFormat
from gguf_embed.jobs.cut import Cut
from gguf_embed.jobs.job import JobReport, Watch, begun, shard_of
from gguf_embed.jobs.manifest import ShardEntry
from gguf_embed.jobs.output import JobOutput
from gguf_embed.jobs.ray_model import ClusterModel
from gguf_embed.jobs.spread import Spread

_log = logging.getLogger(__name__)

AT_A_TIME: Final = 2  # shards that a worker has: one computed, one on its way
AHEAD: Final = 4  # shards for each worker that are under way or wait for their turn
LOOK_S: Final = 2.0  # how often machines that joined are looked for
SILENT_S: Final = 300.0  # without any result: say so
STARTS: Final = 3  # workers of a machine that may fail before it is given up


def connect(address: str) -> None:
    """Join a cluster: "auto", an address, or "local" for one on this machine. Raises BadOption."""
    if ray.is_initialized():
        return
    try:
        ray.init(
            address=None if address == "local" else address,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise BadOption(
            f"--ray {address}: no cluster answers ({error}); start one with `ray start --head`, or "
            "pass --ray local"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What a worker gives back of a shard."""

    entry: ShardEntry
    data: bytes | None  # None: it is on disk, from an earlier run
    n_computed_tokens: int


@ray.remote(max_restarts=0, max_concurrency=1)
class Worker:
    """The model on one machine."""

    def __init__(self, model: ClusterModel, form: ShardFormat) -> None:
        self._model, self._form = model, form
        self._embedder = model.open()

    def ready(self) -> str:
        """Once the model is open: how it runs here."""
        return repr(self._embedder.run_settings)

    def make(self, each: Cut) -> _Made:
        """A shard."""
        unit = begun(self._embedder, each, self._model.options)
        try:
            unit.submit()
            encoded = unit.result()
        finally:
            unit.cancel()
        entry, data = shard_of(each, encoded, self._form)
        return _Made(entry=entry, data=data, n_computed_tokens=encoded.n_computed_tokens)


@dataclass(slots=True, kw_only=True)
class _Machine:
    """A node of the cluster, and its workers."""

    node_id: str
    n_workers: int
    on_gpu: bool
    n_failed: int = 0  # of its workers that never were ready
    workers: list[_Worker] = field(default_factory=list)


@dataclass(slots=True, kw_only=True, eq=False)
class _Worker:
    actor: Any
    machine: _Machine
    ready: bool = False
    has: list[Cut] = field(default_factory=list)


class RayJob:
    """One run. `report` is right at any moment, also after an interruption."""

    def __init__(
        self, model: ClusterModel, output: JobOutput, form: ShardFormat, watch: Watch
    ) -> None:
        self._model = model
        self._output = output
        self._form = form
        self._watch = watch
        self._machines: dict[str, _Machine] = {}
        self._under_way: dict[Any, tuple[_Worker, Cut | None]] = {}
        self._bytes: dict[int, int] = {}  # of the input up to the end of a shard
        self._read_bytes = 0
        self.report = JobReport()

    def run(self, cuts: Iterable[Cut]) -> JobReport:
        """Make all shards that are not there. Raises OutputFailed, NativeFailed and BadInput."""
        model, form = ray.put(self._model), ray.put(self._form)
        spread: Spread[Cut, _Made] = Spread(self._numbered(cuts), ahead=AHEAD)
        began = looked = heard = time.monotonic()
        try:
            self._look(model, form)
            while True:
                spread.ahead = AHEAD * max(1, len(self._workers()))
                self._hand_out(spread)
                self._write(spread)
                if spread.finished:
                    break
                arrived: list[Any] = []
                if self._under_way:
                    arrived, _ = ray.wait([*self._under_way], timeout=LOOK_S)
                for ref in arrived:
                    self._take(ref, spread)
                now = time.monotonic()
                heard = now if arrived else heard
                if now - heard > SILENT_S:
                    _log.warning("no machine of the cluster has answered for %.0f s", now - heard)
                    heard = now
                if now - looked > LOOK_S or not self._under_way:
                    self._look(model, form)
                    looked = now
                    if not self._under_way:
                        time.sleep(0.1)
            self._output.finish()
            return self.report
        finally:
            self.report.computing_s = time.monotonic() - began
            for worker in self._workers():
                ray.kill(worker.actor)
            ray.kill(self._model.source)

    def _numbered(self, cuts: Iterable[Cut]) -> Iterator[Cut]:
        """The same; how much was read up to each is kept for the report."""
        for each in cuts:
            self._bytes[each.index] = each.read_bytes
            yield each

    def _workers(self) -> list[_Worker]:
        return [each for machine in self._machines.values() for each in machine.workers]

    def _look(self, model: Any, form: Any) -> None:
        """Give each machine that is there its workers. Raises NativeFailed where none can work."""
        alive: set[str] = set()
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            alive.add(node["NodeID"])
            if node["NodeID"] not in self._machines:
                n_gpus = int(node["Resources"].get("GPU", 0))
                if not n_gpus and not node["Resources"].get("CPU"):
                    continue  # it only hands out
                self._machines[node["NodeID"]] = _Machine(
                    node_id=node["NodeID"], n_workers=max(1, n_gpus), on_gpu=n_gpus > 0
                )
        for machine in self._machines.values():
            if machine.node_id not in alive or machine.n_failed >= STARTS:
                continue
            while len(machine.workers) < machine.n_workers:
                there = NodeAffinitySchedulingStrategy(machine.node_id, soft=False)
                actor = Worker.options(
                    num_cpus=1, num_gpus=1 if machine.on_gpu else 0, scheduling_strategy=there
                ).remote(model, form)
                worker = _Worker(actor=actor, machine=machine)
                machine.workers.append(worker)
                self._under_way[actor.ready.remote()] = worker, None

    def _hand_out(self, spread: Spread[Cut, _Made]) -> None:
        for worker in self._workers():
            while worker.ready and len(worker.has) < AT_A_TIME:
                each = spread.next()
                if each is None:
                    return
                entry = self._output.known(each.index, each.content)
                if entry is not None:
                    spread.done(each.index, _Made(entry=entry, data=None, n_computed_tokens=0))
                    self._write(spread)
                    continue
                worker.has.append(each)
                self._under_way[worker.actor.make.remote(each)] = worker, each

    def _take(self, ref: Any, spread: Spread[Cut, _Made]) -> None:
        """What a worker has answered, or that it has gone."""
        if ref not in self._under_way:
            return
        worker, each = self._under_way.pop(ref)
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, GgufEmbedError):
                raise error.cause from None
            raise
        except RayActorError as error:
            if (cause := _cause(error)) is not None:
                raise cause from None
            self._lose(worker, spread, str(error))
        except RayError as error:
            self._lose(worker, spread, str(error))
        else:
            if each is None:
                worker.ready = True
                _log.info("a worker is ready: %s", answer)
            else:
                worker.has.remove(each)
                _log.debug("shard %d is made, on node %s", each.index, worker.machine.node_id)
                self._watch.advance(answer.entry.n_rows, answer.n_computed_tokens, 0)
                spread.done(each.index, answer)

    def _lose(self, worker: _Worker, spread: Spread[Cut, _Made], why: str) -> None:
        """A worker has gone: others do what it had."""
        if worker not in worker.machine.workers:
            return
        worker.machine.workers.remove(worker)
        for ref in [ref for ref, (each, _) in self._under_way.items() if each is worker]:
            del self._under_way[ref]
        for each in worker.has:
            spread.lost(each)
        _log.warning(
            "a worker is lost, and what it had is done by another: %s", why.splitlines()[0]
        )
        if not worker.ready:
            worker.machine.n_failed += 1
            if all(each.n_failed >= STARTS for each in self._machines.values()):
                raise NativeFailed(f"no machine of the cluster opens the model: {why}")

    def _write(self, spread: Spread[Cut, _Made]) -> None:
        """Shards in their order: the file, then its line."""
        for index, made in spread.in_order():
            if made.data is None:
                self._output.keep(made.entry)
                self.report.n_kept_shards += 1
                self.report.n_kept_rows += made.entry.n_rows
            else:
                for row in made.entry.failed:
                    self._watch.failed(row)
                self._output.add(made.entry, made.data)
                self.report.n_computed_tokens += made.n_computed_tokens
            self.report.add(made.entry)
            read_bytes = self._bytes.pop(index)
            self._watch.advance(0, 0, max(0, read_bytes - self._read_bytes))
            self._read_bytes = read_bytes


def _cause(error: BaseException) -> GgufEmbedError | None:
    """What a worker's opening has raised, where it is one of our errors."""
    cause = getattr(error, "cause", None) or error.__cause__
    return cause if isinstance(cause, GgufEmbedError) else None
