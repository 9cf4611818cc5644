"""The way to very many texts: machines, time, cost, and what limits, by a small simulation.

    python benchmarks/ray_plan.py --texts 1e9 --tokens 107 --tokens-per-s 413 --machines 200

Every input is measured or said: tokens/s of one machine (`gguf-embed bench`), seconds until its
worker is ready, rows/s that the driver reads and writes, how unequal machines are, how often one
goes. Shards are handed out as jobs/ray_job.py does it. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What is known of the work and the machines."""

    texts: float
    tokens: float  # of a text, mean
    tokens_per_s: float  # of one machine
    machines: int
    ready_s: float = 60.0  # from its start until the model is open and tuned
    skew: float = 0.15  # standard deviation of the machines' speeds, as a share
    loss_per_day: float = 0.05  # share of machines that go in a day; each comes back
    driver_rows_per_s: float = 25_000.0  # read, cut, sent, written: measured, docs/ray.md
    shard_rows: int = 2048
    price_per_hour: float = 0.10  # of one machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What it comes to."""

    hours: float
    machine_hours: float
    price: float
    busy: float  # share of the machines' time that computes
    driver_busy: float  # share of the time in which the driver has work
    n_lost: int  # shards that were computed twice
    limit: str


def simulate(inputs: Inputs, *, seed: int = 1, most_shards: int = 40_000) -> Outcome:
    """Hand out shards to machines, the one that is free first; the driver serves one at a time.

    Of more shards than `most_shards` several are taken as one.
    """
    rng = random.Random(seed)
    n_shards = inputs.texts / inputs.shard_rows
    together = max(1.0, n_shards / most_shards)
    n_units = max(1, round(n_shards / together))
    rows = inputs.texts / n_units
    speeds = [max(0.2, rng.gauss(1, inputs.skew)) for _ in range(inputs.machines)]
    free = [(inputs.ready_s, machine) for machine in range(inputs.machines)]
    heapq.heapify(free)
    driver_free = driver_busy_s = busy_s = end = 0.0
    n_lost = 0
    while n_units:
        at, machine = heapq.heappop(free)
        seconds = rows * inputs.tokens / inputs.tokens_per_s / speeds[machine]
        serving = rows / inputs.driver_rows_per_s
        start = max(at, driver_free)
        driver_free = start + serving
        driver_busy_s += serving
        done = start + serving + seconds
        # A machine that goes loses at most the shard that it is at, not all that are taken as one.
        if rng.random() < inputs.loss_per_day * seconds / 86_400:
            n_lost += 1
            done += inputs.ready_s + seconds / together
        busy_s += seconds
        n_units -= 1
        end = max(end, done)
        heapq.heappush(free, (done, machine))
    busy = busy_s / (inputs.machines * end)
    driver = driver_busy_s / end
    return Outcome(
        hours=round(end / 3600, 2),
        machine_hours=round(inputs.machines * end / 3600, 1),
        price=round(inputs.machines * end / 3600 * inputs.price_per_hour, 2),
        busy=round(busy, 3),
        driver_busy=round(driver, 3),
        n_lost=n_lost,
        limit="the driver reads and writes" if driver > 0.9 else "the machines compute",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind, value in (
        ("texts", float, 1e9),
        ("tokens", float, 107.0),
        ("tokens-per-s", float, 5_522.0),
        ("machines", int, 100),
        ("ready-s", float, 60.0),
        ("skew", float, 0.15),
        ("loss-per-day", float, 0.05),
        ("driver-rows-per-s", float, 25_000.0),
        ("shard-rows", int, 2048),
        ("price-per-hour", float, 0.10),
    ):
        parser.add_argument(f"--{name}", type=kind, default=value)
    inputs = Inputs(**vars(parser.parse_args()))
    outcome = simulate(inputs)
    known = {name: getattr(inputs, name) for name in Inputs.__slots__}
    print(json.dumps({**known, **{name: getattr(outcome, name) for name in Outcome.__slots__}}))


if __name__ == "__main__":
    main()
