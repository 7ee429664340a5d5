"""Long runs on two Ray workers, one of which is killed now and then: the same bits as a calm run, memory that does not grow, and the time kills cost.

A replacement takes two to three seconds of a core to start, whatever a round takes: the soak has rounds of 60 ms, to be long, and shows the worst; the
second job has rounds of seconds, where a kill every other round is to cost less than a third.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import median
from threading import Timer

import numpy as np
import psutil

from experiments.peers.job import JOBS, Job
from experiments.study import Claim, main
from fedsim.encoding import digest
from fedsim.randomness import rng_for
from fedsim.runtime import RayExecutor

SETTLED = 20


def run(quick: bool, out: Path) -> list[Claim]:
    """500 rounds of 60 ms, because memory settles over the first hundred; 10 heavy ones with ``quick``, else 30."""
    rounds = 500
    job = replace(JOBS[0], cohort=128, steps=20)
    calm, calm_times, calm_memory = soak(job, rounds)
    rough, rough_times, _ = soak(job, rounds, kill_every=10)
    driver, workers = (_slope(column) for column in np.array(calm_memory).T)
    print(
        f"{rounds} rounds of {job.cohort} clients: calm {sum(calm_times):.0f} s, with a kill every 10 rounds {sum(rough_times):.0f} s; median rounds "
        f"{1e3 * median(calm_times):.0f} and {1e3 * median(rough_times):.0f} ms; memory of driver and workers grows by {driver:.3f} and {workers:.3f} MB a round\n",
        flush=True,
    )
    return [
        _claim(f"{rounds} rounds with a worker killed every 10: digests that differ from the calm run's", float(rough != calm), "<= 0"),
        _claim("memory of the driver, growth a round after the first 20", driver, "<= 0.05 MB"),
        _claim("memory of two workers together, growth a round after the first 20", workers, "<= 0.1 MB"),
        *heavy_rounds(10 if quick else 30),
    ]


def heavy_rounds(rounds: int) -> list[Claim]:
    """Rounds of seconds with a worker killed every other round, against calm ones."""
    job = replace(JOBS[3], steps=16)
    calm, calm_times, _ = soak(job, rounds)
    rough, rough_times, _ = soak(job, rounds, kill_every=2)
    note = f"rounds of {median(calm_times[1:]):.1f} s; one worker of two killed in the middle of every other round"
    return [
        _claim("heavy rounds with kills: digests that differ from the calm run's", float(rough != calm), "<= 0"),
        _claim("heavy rounds a minute, with kills / without", sum(calm_times) / sum(rough_times), ">= 0.7", note),
    ]


def soak(job: Job, rounds: int, kill_every: int | None = None) -> tuple[str, list[float], list[tuple[float, float]]]:
    """Digest of the final state, seconds of each round, and memory of driver and workers in MB after each.

    A kill comes at a random moment of the first half of what the last round took.
    """
    with RayExecutor(workers=2) as executor:
        training = job.training(executor)
        state, times, memory = training.init(), [], []
        for r in range(rounds):
            rng, killer = rng_for(0, "kill", r), None
            if kill_every is not None and r % kill_every == kill_every - 1:
                pid = executor.pids()[int(rng.integers(2))]
                killer = Timer(0.5 * float(rng.random()) * times[-1], os.kill, (pid, signal.SIGKILL))
                killer.start()
            start = time.perf_counter()
            state, _ = training.step(state)
            times.append(time.perf_counter() - start)
            if killer is not None:
                killer.join()
            memory.append((_rss([os.getpid()]), 0.0 if kill_every else _rss(executor.pids())))
        return digest(state), times, memory


def _rss(pids: Sequence[int]) -> float:
    return sum(psutil.Process(pid).memory_full_info().uss for pid in pids) / 2**20


def _slope(values: np.ndarray) -> float:
    """Least-squares growth a round once settled."""
    settled = values[SETTLED:]
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def _claim(name: str, value: float, bar: str, note: str = "") -> Claim:
    return Claim(name=name, value=value, spread=nan, bar=bar, seeds=1, note=note)


if __name__ == "__main__":
    sys.exit(main("bench_soak", run))
