"""CIFAR-10 on a fleet of phones with two labels each: accuracy against bytes and against simulated time for four upload schedules.

50 clients (mixed phones), 10 a round, 32 local steps on batches of 16, a small CNN. All schedules get the same number of rounds, so they
compute the same and differ in what they send and how long they wait. The rate of each is the better of two on a seed of its own, after fewer rounds. The pictures are read from ``../shared/data/cifar10``
beside the checkout, or from ``$FEDSIM_DATA/cifar10``: ``train.parquet`` and ``test.parquet`` with columns ``img`` and ``label``.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from experiments.study import Claim, Skipped, main, plain_log, save_figure
from experiments.training import Curves, Floats, Trainers, Trial, trainers
from fedsim.communication import DynamicFL, FedSGD, Uniform, UploadSchedule
from fedsim.fleet import Fleet
from fedsim.partition import LabelShards
from fedsim.runs.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, WIDE, figure, styled
from fedsim.runs.text import aligned, duration, plural, size
from fedsim.strategies import FedAvg
from fedsim.tasks import Images

CLIENTS, COHORT, STEPS, BATCH = 50, 10, 32, 16
RATES, TUNING_SEED = (0.05, 0.2), 1000
_CHOSEN = DynamicFL(high=1, budget=0.3)
METHODS: Mapping[str, tuple[UploadSchedule, str]] = {
    "FedAvg": (Uniform(), GREY),
    "uniform, 4 uploads": (Uniform(uploads=4), ORANGE),
    "uniform, about the bytes of DynamicFL": (Uniform.of_equal_bytes(_CHOSEN, COHORT, STEPS), RED),
    "DynamicFL, group 3, high 1": (_CHOSEN, BLUE),
    "DynamicFL, fast links, high 4": (DynamicFL(high=4, budget=0.5, clients="by-link"), GREEN),
    "FedSGD": (FedSGD(), PURPLE),
}
Results = Mapping[str, Sequence[Curves]]


def run(quick: bool, out: Path) -> list[Claim]:
    folder = pictures()
    seeds, rounds, tuning_rounds = (range(1), 20, 6) if quick else (range(3), 40, 12)
    task = Images(
        train=folder / "train.parquet",
        test=folder / "test.parquet",
        width=8,
        train_limit=20_000 if quick else None,
        test_limit=2_000 if quick else None,
    )
    with trainers() as pool:
        rates = choose_rates(task, tuning_rounds, pool)
        trained = pool.train([trial(task, name, rates[name], rounds, seed) for name in METHODS for seed in seeds])
    results = {name: trained[i * len(seeds) : (i + 1) * len(seeds)] for i, name in enumerate(METHODS)}
    report(results, rates, rounds, len(seeds))
    draw(results, "bytes", 1e-6, "MB sent and received so far", out / "accuracy_by_bytes.png")
    draw(results, "clock", 1.0, "simulated seconds", out / "accuracy_by_time.png")
    best = max(results, key=lambda name: fmean(finals(results[name])))
    return [Claim.measured("accuracy of the best schedule", finals(results[best]), bar="> 35 %", note=f"the best is {best}")]


def pictures() -> Path:
    """The folder of the Parquet files; :class:`Skipped` where it is absent."""
    root = os.environ.get("FEDSIM_DATA")
    folder = (Path(root) if root else Path(__file__).parents[3] / "shared" / "data") / "cifar10"
    missing = [name for name in ("train.parquet", "test.parquet") if not (folder / name).is_file()]
    if missing:
        raise Skipped(f"{folder} holds no {' and no '.join(missing)}; set FEDSIM_DATA to the folder that holds cifar10/")
    return folder


def trial(task: Images, name: str, rate: float, rounds: int, seed: int) -> Trial:
    return Trial(
        task=task,
        fleet=Fleet.sample(CLIENTS, devices="mixed-phones", partition=LabelShards(2), seed=seed),
        strategy=FedAvg(client_lr=rate, cohort=COHORT, local_steps=STEPS, batch_size=BATCH, clip=10.0),
        communication=METHODS[name][0],
        rounds=rounds,
        seed=seed,
    )


def choose_rates(task: Images, rounds: int, pool: Trainers) -> dict[str, float]:
    """For each schedule the better of RATES on the tuning seed; one that diverges is never chosen."""
    trained = iter(pool.train([trial(task, name, rate, rounds, TUNING_SEED) for name in METHODS for rate in RATES]))
    found = {name: np.nan_to_num([next(trained).final() for _ in RATES], nan=-1.0) for name in METHODS}
    return {name: RATES[int(np.argmax(values))] for name, values in found.items()}


def finals(curves: Sequence[Curves]) -> list[float]:
    """Accuracy by seed in percent."""
    return [100 * c.final() for c in curves]


def report(results: Results, rates: Mapping[str, float], rounds: int, seeds: int) -> None:
    print(f"CIFAR-10, {rounds} rounds, {plural(seeds, 'seed')}\n{at_the_end(results, rates)}\n")
    print(f"accuracy % by the time this much was sent and received\n{at_budgets(results, 'bytes', size)}\n")
    print(f"accuracy % after this much simulated time\n{at_budgets(results, 'clock', duration)}\n", flush=True)


def at_the_end(results: Results, rates: Mapping[str, float]) -> str:
    header = ["schedule", "rate", "accuracy %", "best round %", "uploads", "up", "down", "simulated time"]
    rows = [
        [
            name,
            f"{rates[name]:g}",
            f"{fmean(finals(curves)):.1f}",
            f"{100 * fmean(c.best() for c in curves):.1f}",
            f"{mean(curves, 'uploads')[-1]:,.0f}",
            size(mean(curves, "bytes_up")[-1]),
            size(mean(curves, "bytes_down")[-1]),
            duration(mean(curves, "clock")[-1]),
        ]
        for name, curves in results.items()
    ]
    return aligned(header, rows)


def at_budgets(results: Results, across: str, unit: Callable[[float], str]) -> str:
    """The last accuracy read within each of six budgets, from the cheapest schedule's total to the dearest one's; a star marks a schedule that had ended."""
    totals = [mean(curves, across)[-1] for curves in results.values()]
    budgets = np.geomspace(min(totals), max(totals), 6) * (1 + 1e-9)
    rows = [
        [name, *(within(mean(curves, across), mean(curves, "accuracy"), budget) for budget in budgets)] for name, curves in results.items()
    ]
    return aligned(["schedule", *map(unit, budgets)], rows)


def within(spent: Floats, accuracy: Floats, budget: float) -> str:
    """
    >>> [within(np.array([1.0, 2.0]), np.array([0.3, 0.4]), budget) for budget in (0.5, 1.5, 2.0, 3.0)]
    ['–', '30.0', '40.0', '40.0*']
    """
    afforded = int((spent <= budget).sum())
    if not afforded:
        return "–"
    return f"{100 * accuracy[afforded - 1]:.1f}" + ("*" if budget > 1.01 * spent[-1] else "")


def mean(curves: Sequence[Curves], of: str) -> Floats:
    """A column by round, mean over seeds."""
    return np.asarray(np.mean([getattr(c, of) for c in curves], axis=0))


@styled
def draw(results: Results, across: str, scale: float, label: str, path: Path) -> None:
    drawn = figure(WIDE, 3.6)
    axes = drawn.subplots()
    for name, curves in results.items():
        axes.plot(
            scale * mean(curves, across), 100 * mean(curves, "accuracy"), color=METHODS[name][1], label=name, marker="o", markersize=2.5
        )
    axes.set(title="CIFAR-10, two labels a client", xlabel=label, ylabel="test accuracy, %", xscale="log", ylim=(0, None))
    plain_log(axes)
    axes.legend(loc="upper left", fontsize=7)
    save_figure(drawn, path)


if __name__ == "__main__":
    sys.exit(main("cifar10_rounds", run))
