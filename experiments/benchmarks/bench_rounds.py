"""The same federated job on fedsim, a plain PyTorch loop, a program batched by hand, pfl-research and Flower's simulation engine, side by side.

Same data, initial model, cohorts, batches in the same order, rate and precision; one thread an engine; the engines take turns in every
repetition, and a ratio is the median of the repetitions' ratios. No ratio is printed unless the engines end with the same test loss. First rounds and
start-up are reported apart from the steady state. pfl lives in an environment of its own under the folder given by ``FEDSIM_PEERS`` or ``results/peers``.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil
import torch

from experiments.peers import by_hand, loop, ours, pfl_research
from experiments.peers.job import JOBS, Job, Vector
from experiments.study import Claim, main
from experiments.timing import one_thread
from fedsim.runs.text import aligned
from fedsim.runtime import RayExecutor, SerialExecutor
from fedsim.runtime.executor import Executor

MLP, TINY, LARGE, HEAVY = JOBS
Engine = Callable[[], tuple[list[float], Vector]]


def run(quick: bool, out: Path) -> list[Claim]:
    """5 repetitions with ``quick``, else 15."""
    repeats = 5 if quick else 15
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, torch {torch.__version__}\n", flush=True)
    with one_thread():
        claims = [*perceptrons(repeats), *pictures(TINY, repeats), *pictures(LARGE, repeats)]
        claims += [*two_workers(repeats), *against_pfl(repeats, out), *against_flower(1 if quick else 3, out)]
    return claims


def perceptrons(repeats: int) -> list[Claim]:
    """The 64-64-10 perceptron: dispatch is everything."""
    found = in_turn(
        MLP,
        {
            "plain loop": lambda: loop.run(MLP, MLP.rounds),
            "by hand, torch": lambda: by_hand.run_torch(MLP, MLP.rounds),
            "by hand, NumPy": lambda: by_hand.run_numpy(MLP, MLP.rounds),
            "fedsim": lambda: ours.run(MLP, MLP.rounds, SerialExecutor()),
        },
        repeats,
    )
    best = min(("by hand, torch", "by hand, NumPy"), key=lambda name: median(found[name]))
    return [
        _faster("perceptron: clients/s, fedsim / plain loop", found["plain loop"], found["fedsim"], ">= 8 x"),
        _faster(
            "perceptron: clients/s, fedsim / the best program by hand", found[best], found["fedsim"], ">= 0.8 x", f"the best is {best}"
        ),
    ]


def pictures(job: Job, repeats: int) -> list[Claim]:
    """A small CNN against the loop, and the loop in channels-last."""
    found = in_turn(
        job,
        {
            "plain loop": lambda: loop.run(job, job.rounds),
            "plain loop, channels last": lambda: loop.run(job, job.rounds, channels_last=True),
            "fedsim": lambda: ours.run(job, job.rounds, SerialExecutor()),
        },
        repeats,
    )
    if job is TINY:
        return [_faster(f"{job.name}: clients/s, fedsim / plain loop", found["plain loop"], found["fedsim"], ">= 2.5 x")]
    best = min(("plain loop", "plain loop, channels last"), key=lambda name: median(found[name]))
    return [_faster(f"{job.name}: clients/s, fedsim / the better loop", found[best], found["fedsim"], ">= 1 x", f"the better is {best}")]


def two_workers(repeats: int) -> list[Claim]:
    """Serial against two Ray workers, as the work of a round grows."""
    with RayExecutor(workers=2) as ray:
        rows, ratios = [], {}
        for job in (MLP, replace(MLP, cohort=200), replace(TINY, cohort=100), LARGE, HEAVY):
            executors: dict[str, Executor] = {"serial": SerialExecutor(), "Ray, 2 workers": ray}
            engines: dict[str, Engine] = {name: _on(job, executor) for name, executor in executors.items()}
            found = in_turn(job, engines, max(3, repeats // 2), quiet=True)
            ratio = median(a / b for a, b in zip(found["serial"], found["Ray, 2 workers"], strict=True))
            ratios[job] = found
            rows.append([f"{job.name}, cohort {job.cohort}", f"{1e3 * median(found['serial']):.0f} ms", f"{ratio:.2f}"])
    print(f"Two Ray workers against the serial engine\n{aligned(['job', 'a serial round', 'times faster'], rows)}\n", flush=True)
    note = "Ray pays from about the size where this table passes 1"
    return [
        _faster("Ray with 2 workers / serial, " + HEAVY.name, ratios[HEAVY]["serial"], ratios[HEAVY]["Ray, 2 workers"], ">= 1.6 x", note)
    ]


def against_pfl(repeats: int, out: Path) -> list[Claim]:
    """The perceptron on pfl-research, one process."""
    name, bar = "perceptron: clients/s, fedsim / pfl-research 0.6.0", ">= 12 x"
    try:
        python = pfl_research.environment(Path(os.environ.get("FEDSIM_PEERS", "results/peers")) / "pfl")
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return [Claim(name=name, value=nan, spread=nan, bar=bar, seeds=1, note=f"not measured: {error}")]
    theirs, mine = [], []
    with TemporaryDirectory() as scratch:
        for _ in range(min(repeats, 5)):
            found = pfl_research.run(MLP, MLP.rounds, python, Path(scratch))
            seconds, params = ours.run(MLP, MLP.rounds, SerialExecutor())
            _same_loss(MLP, {"pfl": found["loss"], "fedsim": MLP.test_loss(params)}, 0.02)
            theirs.append(median(found["seconds"][1:]))
            mine.append(median(seconds[1:]))
    return [_faster(name, theirs, mine, bar)]


def against_flower(repeats: int, out: Path) -> list[Claim]:
    """The perceptron and the large pictures on Flower's engine with two actors; whole processes, and their steady state."""
    claims = []
    for job, bars in ((MLP, (">= 50 x", ">= 10 x")), (HEAVY, (">= 1 x", ">= 1 x"))):
        theirs, mine = [], []
        rounds = job.rounds if job is MLP else 3
        for _ in range(repeats):
            theirs.append(_process("flower", job, rounds))
            mine.append(_process("whole", job, rounds))
        _same_loss(job, {"Flower": theirs[0]["loss"], "fedsim": mine[0]["loss"]}, 1e-4)
        print(
            f"Flower, {job.name}: first round {theirs[0]['seconds'][0]:.2f} s, then {median(theirs[0]['seconds'][1:]):.3f} s, process {theirs[0]['whole']:.1f} s, "
            f"{theirs[0]['memory'] / 2**20:.0f} MB; fedsim {mine[0]['seconds'][0]:.2f} s, {median(mine[0]['seconds'][1:]):.4f} s, {mine[0]['whole']:.1f} s, "
            f"{mine[0]['memory'] / 2**20:.0f} MB\n",
            flush=True,
        )
        steady = [[median(r["seconds"][1:]) for r in side] for side in (theirs, mine)]
        whole = [[r["whole"] for r in side] for side in (theirs, mine)]
        note = (
            "a tiny job is Flower's worst case: its engine polls every 0.1 s"
            if job is MLP
            else "a heavy job, Flower on two actors, fedsim serial"
        )
        claims.append(_faster(f"{job.name}: steady round, Flower's engine / fedsim", *steady, bars[0], note))
        claims.append(_faster(f"{job.name}: whole {rounds}-round process, Flower's engine / fedsim", *whole, bars[1]))
    return claims


def in_turn(job: Job, engines: dict[str, Engine], repeats: int, *, quiet: bool = False) -> dict[str, list[float]]:
    """Median steady seconds of a round, by engine, one for each repetition; refuses engines whose test losses differ."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    first, losses = {}, {}
    for repeat in range(repeats):
        for name, engine in engines.items():
            found, params = engine()
            seconds[name].append(median(found[1:]))
            if not repeat:
                first[name], losses[name] = found[0], job.test_loss(params)
    _same_loss(job, losses, 1e-4)
    if not quiet:
        base = seconds[next(iter(seconds))]
        rows = []
        for name, own in seconds.items():
            ratios = [a / b for a, b in zip(base, own, strict=True)]
            spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            rows.append([name, f"{job.cohort / median(own):,.0f}", spread, f"{1e3 * first[name]:.0f} ms", f"{losses[name]:.6f}"])
        print(f"{job.name}: cohort {job.cohort}, {job.steps} steps on {job.batch} examples")
        print(f"{aligned(['engine', 'clients/s', 'x the first', 'first round', 'test loss'], rows)}\n", flush=True)
    return seconds


def _on(job: Job, executor: Executor) -> Engine:
    return lambda: ours.run(job, max(3, min(job.rounds, 6)), executor)


def _process(module: str, job: Job, rounds: int) -> dict[str, float]:
    """One engine as a process of its own, with its wall-clock seconds and the peak of its processes' memory in bytes."""
    with TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.peers.{module}", job.name, str(rounds), str(found)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.2)
        if process.returncode:
            raise RuntimeError(f"{module} ended with {process.returncode} on {job.name}")
        return json.loads(found.read_text()) | {"whole": time.perf_counter() - start, "memory": peak}


def _memory(pid: int) -> int:
    """Proportional memory of a process and its children, in bytes."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def _same_loss(job: Job, losses: dict[str, float], tolerance: float) -> None:
    if max(losses.values()) - min(losses.values()) > tolerance * abs(min(losses.values())):
        raise RuntimeError(f"{job.name}: the engines end with different test losses, so they did not do the same work: {losses}")


def _faster(name: str, slow: Sequence[float], fast: Sequence[float], bar: str, note: str = "") -> Claim:
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    spread = f"{len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f}"
    return Claim(name=name, value=median(ratios), spread=nan, bar=bar, seeds=1, note="; ".join(filter(None, [spread, note])))


if __name__ == "__main__":
    sys.exit(main("bench_rounds", run))
