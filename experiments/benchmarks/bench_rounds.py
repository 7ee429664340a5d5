"""The same federated job on fedsim, a plain PyTorch loop, a program batched by hand, pfl-research and Flower's simulation engine, side by side.

Same data, initial model, cohorts, batches in the same order, rate and precision; one thread a process. The engines take turns in every
repetition, and a ratio is the median of the repetitions' ratios; none is printed unless the engines end with the same test loss. Start-up, first round
and steady state are reported apart. Competitors get their fast settings: clients in an importable module, data kept in each process,
one CPU a client, no dashboard, no evaluation. pfl lives in an environment of its own under the folder ``FEDSIM_PEERS`` or
``results/peers``. A machine too busy for timings is refused unless ``FEDSIM_NOISY=1``.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from math import nan
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from experiments.peers import by_hand, loop, ours, pfl_research
from experiments.peers.job import JOBS, Job
from experiments.peers.process import Ended, engine
from experiments.peers.process import run as run_process
from experiments.peers.race import Engine, Raced, faster, race, same_loss, table, unmeasured
from experiments.study import Claim, Skipped, main, save_figure
from experiments.timing import one_thread
from fedsim.runs.style import BLUE, GREY, WIDE, figure, styled
from fedsim.runs.text import aligned
from fedsim.runtime import RayExecutor, SerialExecutor
from fedsim.runtime.executor import Executor

MLP, TINY, LARGE, HEAVY = JOBS
MOST_LOAD = 1.5  # per core, beyond which timings say little
QUIET = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}


def run(quick: bool, out: Path) -> list[Claim]:
    """With ``quick`` 5 repetitions and 2 of whole processes, else 15 and 5."""
    os.environ.update(QUIET)
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "ray", "flwr"))
    print(f"{cores} cores, load {load:.2f}; {packages}\n", flush=True)
    if load > MOST_LOAD * cores and not os.environ.get("FEDSIM_NOISY"):
        raise Skipped(f"load {load:.1f} on {cores} cores is too much for timings; wait, or set FEDSIM_NOISY=1 for ratios on a busy machine")
    repeats, processes = (5, 2) if quick else (15, 5)
    with one_thread():
        perceptron = show(MLP, {**loops(MLP), **programs(), "fedsim": serial(MLP)}, repeats)
        small, large = (show(job, {**loops(job), "fedsim": serial(job)}, repeats) for job in (TINY, LARGE))
        claims = [*against_programs(perceptron), *against_loops(small, large), against_serial(max(3, repeats // 3))]
    wholes = whole_processes(MLP, ("loop", "by-hand", "fedsim", "fedsim-ray", "flower"), MLP.rounds, processes)
    heavy = whole_processes(HEAVY, ("fedsim-ray", "flower"), HEAVY.rounds, processes)
    claims += [*against_flower(wholes, "fedsim", (">= 50 x", ">= 10 x")), *against_flower(heavy, "fedsim-ray", (">= 1 x", ">= 1 x"))]
    claims.append(against_pfl(processes if quick else repeats))
    draw(perceptron, wholes, out)
    return claims


def loops(job: Job) -> dict[str, Engine]:
    """Plain PyTorch, one client after another."""
    found: dict[str, Engine] = {"plain loop": lambda: loop.run(job, job.rounds)}
    if job.model == "mlp":
        return found | {"loop of loaders and fresh models": lambda: loop.run_with_loaders(job, job.rounds)}
    return found | {"plain loop, channels last": lambda: loop.run(job, job.rounds, channels_last=True)}


def programs() -> dict[str, Engine]:
    """The perceptron's clients stacked by hand."""
    return {"by hand, torch": lambda: by_hand.run_torch(MLP, MLP.rounds), "by hand, NumPy": lambda: by_hand.run_numpy(MLP, MLP.rounds)}


def serial(job: Job) -> Engine:
    return lambda: ours.run(job, job.rounds, SerialExecutor())


def show(job: Job, engines: dict[str, Engine], repeats: int) -> dict[str, Raced]:
    """Race and print."""
    found = race(job, engines, repeats)
    print(table(job, found), flush=True)
    return found


def against_programs(found: dict[str, Raced]) -> list[Claim]:
    """The perceptron, where dispatch is everything."""
    best = min(programs(), key=lambda name: found[name].median)
    own, others = found["fedsim"].seconds, f"the best is {best}"
    return [
        faster("perceptron: clients/s, fedsim / plain loop", found["plain loop"].seconds, own, ">= 8 x"),
        faster("perceptron: clients/s, fedsim / the best program by hand", found[best].seconds, own, ">= 0.8 x", others),
    ]


def against_loops(small: dict[str, Raced], large: dict[str, Raced]) -> list[Claim]:
    """Pictures: where dispatch dominates, and where the convolutions do."""
    best = min(loops(LARGE), key=lambda name: large[name].median)
    return [
        faster(f"{TINY.name}: clients/s, fedsim / plain loop", small["plain loop"].seconds, small["fedsim"].seconds, ">= 2.5 x"),
        faster(
            f"{LARGE.name}: clients/s, fedsim / the better loop",
            large[best].seconds,
            large["fedsim"].seconds,
            ">= 1 x",
            f"the better is {best}",
        ),
    ]


def against_serial(repeats: int) -> Claim:
    """Serial against two Ray workers as a round's work grows, and what the machine gives to two independent processes."""
    jobs = (MLP, replace(MLP, cohort=200), replace(TINY, cohort=100), LARGE, HEAVY, replace(HEAVY, steps=8))
    found, rows = {}, []
    with RayExecutor(workers=2) as ray:
        for job in jobs:
            found[job] = race(job, {"serial": _rounds(job, SerialExecutor()), "Ray": _rounds(job, ray)}, repeats)
            ratio = median(a / b for a, b in zip(found[job]["serial"].seconds, found[job]["Ray"].seconds, strict=True))
            rows.append(
                (
                    found[job]["serial"].median,
                    ratio,
                    [f"{job.name}, {job.steps} steps", str(job.cohort), f"{1e3 * found[job]['serial'].median:.0f} ms", f"{ratio:.2f}"],
                )
            )
    rows.sort(key=lambda row: row[0])
    ceiling = two_at_once()
    print("Two Ray workers against the serial engine")
    print(f"{aligned(['job', 'cohort', 'a serial round', 'times faster'], [row[2] for row in rows])}")
    pays = next((seconds for seconds, ratio, _ in rows if ratio > 1), nan)
    said = f"Ray pays from rounds of about {1e3 * pays:.0f} ms" if pays == pays else "Ray pays for none of these rounds"
    print(f"{said}; two independent plain loops at once do {ceiling:.2f} times the work of one\n", flush=True)
    last = found[jobs[-1]]
    return faster(
        f"Ray with 2 workers / serial, {HEAVY.name}, 8 steps",
        last["serial"].seconds,
        last["Ray"].seconds,
        ">= 1.6 x",
        f"{said}; two independent processes reach {ceiling:.2f}",
    )


def two_at_once() -> float:
    """How many times the work of one process two do that share the machine."""
    with ThreadPoolExecutor(2) as pool:
        alone = engine("loop", LARGE, 12).steady
        both = list(pool.map(lambda _: engine("loop", LARGE, 12).steady, range(2)))
        again = engine("loop", LARGE, 12).steady
    return (alone + again) / (sum(both) / 2)


def whole_processes(job: Job, engines: Sequence[str], rounds: int, repeats: int) -> dict[str, list[Ended]]:
    """Every engine's whole process in turn, printed."""
    found: dict[str, list[Ended]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name in engines:
            found[name].append(engine(name, job, rounds))
    same_loss(job, {name: own[0].loss for name, own in found.items()}, 1e-4)
    print(f"{job.name}: whole processes of {rounds} rounds, {repeats} of each\n{_table(found)}\n", flush=True)
    return found


def against_flower(found: dict[str, list[Ended]], own: str, bars: tuple[str, str]) -> list[Claim]:
    """Flower's engine on two actors: its steady round, and its whole process."""
    theirs, mine, tiny = found["flower"], found[own], own == "fedsim"
    job = "perceptron" if tiny else HEAVY.name
    note = "a tiny job is Flower's worst case: its engine polls every 0.1 s" if tiny else "a heavy job; both on two workers"
    rounds = len(theirs[0].rounds)
    return [
        faster(f"{job}: steady round, Flower's engine / fedsim", [e.steady for e in theirs], [e.steady for e in mine], bars[0], note),
        faster(
            f"{job}: whole {rounds}-round process, Flower's engine / fedsim", [e.whole for e in theirs], [e.whole for e in mine], bars[1]
        ),
    ]


def against_pfl(repeats: int) -> Claim:
    """The perceptron on pfl-research, one process."""
    name, bar = "perceptron: clients/s, fedsim / pfl-research 0.6.0", ">= 12 x"
    try:
        python = pfl_research.environment(Path(os.environ.get("FEDSIM_PEERS", "results/peers")) / "pfl")
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return unmeasured(name, bar, error)
    found: dict[str, list[Ended]] = {"fedsim": [], "pfl": []}
    with TemporaryDirectory() as scratch:
        command = pfl_research.command(MLP, MLP.rounds, python, Path(scratch))
        for _ in range(max(5, repeats)):
            found["pfl"].append(run_process(command))
            found["fedsim"].append(engine("fedsim", MLP, MLP.rounds))
    same_loss(MLP, {name: own[0].loss for name, own in found.items()}, 0.02)
    print(f"{MLP.name}: whole processes\n{_table(found)}\n", flush=True)
    return faster(name, [e.steady for e in found["pfl"]], [e.steady for e in found["fedsim"]], bar)


@styled
def draw(raced: dict[str, Raced], wholes: dict[str, list[Ended]], out: Path) -> None:
    """Clients a second on the perceptron, of all engines."""
    rates = {name: MLP.cohort / found.median for name, found in raced.items()}
    names = {"fedsim-ray": "fedsim, 2 Ray workers", "flower": "Flower's engine, 2 actors"}
    rates |= {shown: MLP.cohort / median(e.steady for e in wholes[name]) for name, shown in names.items()}
    drawn = figure(WIDE, 2.6)
    axes = drawn.subplots()
    axes.barh(list(rates), list(rates.values()), color=[BLUE if name.startswith("fedsim") else GREY for name in rates])
    axes.set(xscale="log", xlabel=f"clients a second, {MLP.name}, steady state")
    axes.invert_yaxis()
    save_figure(drawn, out / "rounds.png")


def _table(found: dict[str, list[Ended]]) -> str:
    rows = []
    for name, own in found.items():
        middle = [f"{median(values):.2f} s" for values in ([e.whole for e in own], [e.start for e in own], [e.rounds[0] for e in own])]
        steady = f"{1e3 * median(e.steady for e in own):.1f} ms"
        rows.append([name, *middle, steady, f"{max(e.memory for e in own) / 2**20:.0f} MB", f"{own[0].loss:.6f}"])
    return aligned(["engine", "whole", "outside rounds", "first round", "steady round", "peak memory", "test loss"], rows)


def _rounds(job: Job, executor: Executor) -> Engine:
    return lambda: ours.run(job, max(3, min(job.rounds, 6)), executor)


if __name__ == "__main__":
    sys.exit(main("bench_rounds", run))
