"""A million streams a tick: what serving and monitoring a fleet cost, from 1e4 to 1e6 clients.

Each client meets one example a tick, its submodel (one of three levels) and the dense model are evaluated on it, one detector watches all.
Every fleet is served in a process of its own for one block of ticks, on one core; the first ten ticks calibrate the monitor. Seconds are
those the process computes, memory is the most that was resident, above what was before the stream was made: the calibration's.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from experiments.study import Claim, main, plain_log, save_figure
from fedsim.deployment import deploy
from fedsim.fleet import Fleet
from fedsim.monitoring import Monitoring
from fedsim.parameters import Layout
from fedsim.policies import RepruneOnAlarm
from fedsim.pruning import GISP
from fedsim.resampled import Resampled
from fedsim.runs.style import BLUE, GREY, WIDE, figure, styled
from fedsim.runs.text import aligned
from fedsim.runtime import SerialExecutor
from fedsim.serving import Server
from fedsim.simulation import Simulation, world
from fedsim.strategies import FedAvg
from fedsim.stream import Serving
from fedsim.tasks import Digits

FLEETS = (10_000, 100_000, 1_000_000)
TICKS, LEARNT = 16, 10


def run(quick: bool, out: Path) -> list[Claim]:
    """One repetition of the largest fleet with ``quick``, else three; three of the others."""
    repeats = {size: 1 if quick and size == FLEETS[-1] else 3 for size in FLEETS}
    found: dict[int, list[dict[str, float]]] = {size: [] for size in FLEETS}
    for repeat in range(3):
        for size in FLEETS:
            if repeat < repeats[size]:
                found[size].append(_process(size))
    middle = {size: {name: median(r[name] for r in results) for name in results[0]} for size, results in found.items()}
    _print(middle)
    _draw(middle, out)
    million, few = middle[FLEETS[-1]], middle[FLEETS[0]]
    ratio = (million["block"] / FLEETS[-1]) / (few["block"] / FLEETS[0])
    quiet = f"of which watching, policy and records {million['tick']:.2f} s"
    return [
        _claim("seconds a tick of 1e6 streams, losses included, one core", million["block"] / TICKS, "<= 6 s", repeats[FLEETS[-1]], quiet),
        _claim("seconds a stream at 1e6 over those at 1e4", ratio, "<= 1.25", repeats[FLEETS[-1]], ""),
        _claim(
            "peak memory of a served fleet of 1e6, a stream",
            million["most"] / FLEETS[-1],
            "<= 1000 bytes",
            repeats[FLEETS[-1]],
            f"while the monitor fits its laws; {million['held'] / FLEETS[-1]:.0f} bytes after it",
        ),
    ]


def measure(size: int) -> dict[str, float]:
    """Seconds of a block of ticks and of the middle tick with a watched fleet; bytes that serving added to this process, at its end and at most."""
    torch.set_num_threads(1)
    simulation = _simulation(size)
    module = simulation.task.build(0)
    params = Layout.of(module).flatten(module)
    with SerialExecutor() as executor:
        _serve(_simulation(5_000), params, executor)  # what any fleet loads
        process = psutil.Process()
        before = process.memory_info().rss
        seconds = _serve(simulation, params, executor)
        held, most = process.memory_info().rss, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"block": sum(seconds), "tick": median(seconds[LEARNT + 1 :]), "held": held - before, "most": most - before}


def _serve(simulation: Simulation, params: np.ndarray, executor: SerialExecutor) -> list[float]:
    deployed = deploy(
        task=simulation.task,
        fleet=simulation.fleet,
        pruner=simulation.deployment,
        capacity=simulation.capacity,
        params=params,
        seed=0,
        executor=executor,
    )
    server = Server.prepare(simulation, world(simulation), params, deployed, executor, None)
    state, seconds = server.init(), []
    for _ in range(TICKS):
        start = time.process_time()
        state, _ = server.step(state)
        seconds.append(time.process_time() - start)
    return seconds


def _simulation(size: int) -> Simulation:
    return Simulation(
        task=Digits(hidden=(64,)),
        fleet=Fleet.sample(size, partition=Resampled(size=50), seed=0),
        strategy=FedAvg(),
        deployment=GISP(levels=(0.0, 0.4, 0.6), steps=4, calibration="global", calibration_examples=256),
        serving=Serving(ticks=TICKS, batch=1),
        monitoring=Monitoring(calibration=LEARNT, recalibration=LEARNT, shift=1.5),
        policy=RepruneOnAlarm(),
    )


def _process(size: int) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.benchmarks.bench_serving", "--measure", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"a fleet of {size} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _print(middle: dict[int, dict[str, float]]) -> None:
    rows = [
        [
            f"{size:,}",
            f"{found['block'] / TICKS:.3f} s",
            f"{1e6 * found['block'] / TICKS / size:.2f} us",
            f"{found['tick']:.3f} s",
            f"{found['held'] / size:.0f}",
            f"{found['most'] / size:.0f}",
        ]
        for size, found in middle.items()
    ]
    print(
        f"{aligned(['streams', 'a tick', 'a stream and tick', 'of a tick, without losses', 'bytes a stream', 'at most'], rows)}\n",
        flush=True,
    )


@styled
def _draw(middle: dict[int, dict[str, float]], out: Path) -> None:
    drawn = figure(WIDE, 3.2)
    left, right = drawn.subplots(1, 2)
    sizes = list(middle)
    left.plot(sizes, [1e6 * middle[s]["block"] / TICKS / s for s in sizes], color=BLUE, marker="o")
    left.set(xlabel="streams", ylabel="microseconds a stream and tick", xscale="log", ylim=(0, None))
    right.plot(sizes, [middle[s]["most"] / s for s in sizes], color=GREY, marker="o")
    right.set(xlabel="streams", ylabel="bytes a stream", xscale="log", ylim=(0, None))
    for axis in (left, right):
        plain_log(axis)
    save_figure(drawn, out / "serving.png")


def _claim(name: str, value: float, bar: str, repeats: int, note: str) -> Claim:
    return Claim(name=name, value=value, spread=nan, bar=bar, seeds=repeats, note=note)


def _entry(arguments: Sequence[str]) -> Any:
    if arguments[:1] == ["--measure"]:
        print(json.dumps(measure(int(arguments[1]))))
        return 0
    return main("bench_serving", run)


if __name__ == "__main__":
    sys.exit(_entry(sys.argv[1:]))
