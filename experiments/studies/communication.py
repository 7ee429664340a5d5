"""DynamicFL against uniform upload intervals on scikit-learn's digits: at equal bytes, and at equal simulated time.

Le, Diao, Wang, Tarokh, Ding, Anwar (2024), arXiv:2409.04986. 100 clients with one or two labels each, 64 local steps on batches of 5, 20
rounds. A rate is the best of three on two seeds that are not used again; one marked "as" was chosen for another method of its kind.
Accuracy is the mean over the last quarter of the simulated time (the last 5 of 20 rounds) +- its standard error over fresh seeds. A
"uniform, bytes of" row spends the uploads of the method it names, seed by seed: their number varies from round to round. Rows where
uniform wins stay.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from experiments.settings import LINEAR, MLP, ROUNDS, STEPS, Method, Result, Results, Setting, measure
from experiments.study import Claim, main, plain_log, save_figure, standard_error
from experiments.training import trainers
from fedsim.communication import Cohort, DynamicFL, FedSGD, RandomGroup, TwoLevel, Uniform
from fedsim.runs.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, WIDE, figure, styled
from fedsim.runs.text import plural

KL, KL_ALONE, UNIFORM, UNIFORM_ALONE = "KL group", "only the KL group", "uniform, bytes of KL group", "uniform, bytes of only KL"


@dataclass(frozen=True, kw_only=True)
class EveryFastClient(TwoLevel):
    """All clients of the cohort whose link is faster than its slowest: the group without a choice."""

    def largest(self, cohort: int) -> int:
        return cohort

    def choose(self, cohort: Cohort, round: int, seed: int) -> tuple[NDArray[np.int64], float]:
        return np.flatnonzero(cohort.up_seconds < cohort.up_seconds.max()), float("nan")


def run(quick: bool, out: Path) -> list[Claim]:
    seeds = range(5 if quick else 10)
    with trainers() as pool:
        measured = [(setting, measure(setting, seeds, pool)) for setting in settings(quick)]
    first, covered, timed = (results for setting, results in measured if setting.title.startswith(("row 1", "row 4", "(iv)")))
    draw_bytes(first, covered, out / "accuracy_by_bytes.png")
    draw_time(timed, out / "accuracy_by_time.png")
    draw_ratio(first, out / "cost_ratio.png")
    return claims([results for _, results in measured], first, covered, timed)


def settings(quick: bool) -> list[Setting]:
    """Rows 1, 4 and (iv); in full also the others, all with every method."""
    rows = [
        equal_bytes("row 1: linear, one label, group 3 of 10, high 1", LINEAR, 1, 10, 3, 1, curve(), alone=not quick),
        equal_bytes("row 4: MLP, one label, group 10 of 20, high 8", MLP, 1, 20, 10, 8, () if quick else (_FEDSGD,)),
        equal_time("(iv): MLP, one label, 10 clients, 30 % on 64x faster links, equal simulated time", 1),
    ]
    if quick:
        return rows
    return [
        *rows,
        equal_bytes("row 2: MLP, one label, group 3 of 10, high 1", MLP, 1, 10, 3, 1, (_FEDSGD,)),
        equal_bytes("row 3: MLP, two labels, group 6 of 20, high 1", MLP, 2, 20, 6, 1),
        equal_bytes("row 5: MLP, one label, group 10 of 20, high 16", MLP, 1, 20, 10, 16),
        equal_bytes("row 6: MLP, two labels, group 6 of 20, high 8", MLP, 2, 20, 6, 8),
        equal_bytes("row 7: MLP, one label, group 10 of 20, high 1", MLP, 1, 20, 10, 1),
        equal_time("two labels, else as (iv)", 2),
    ]


_FEDSGD = Method(name="FedSGD", schedule=FedSGD())


def equal_bytes(
    title: str, hidden: tuple[int, ...], labels: int, cohort: int, group: int, high: int, extra: Sequence[Method] = (), alone: bool = True
) -> Setting:
    """Equal links; two-level methods beside the uniform schedule that spends their bytes, and with ``alone`` those in which only the group trains."""
    chosen = DynamicFL(high=high, budget=group / cohort)
    methods: tuple[Method, ...] = (
        Method(name="FedAvg", schedule=Uniform()),
        Method(name="random group", schedule=RandomGroup(size=group, high=high), rate_as=KL),
        Method(name=KL, schedule=chosen),
        Method(name="KL group, others weigh .1", schedule=replace(chosen, discount=0.1), rate_as=KL),
        Method(name=UNIFORM, schedule=Uniform.of_equal_bytes(chosen, cohort, STEPS), matches=KL),
    )
    if alone:
        only = replace(chosen, skip=True)
        methods += (
            Method(name="only a random group", schedule=RandomGroup(size=group, high=high, skip=True), rate_as=KL_ALONE),
            Method(name=KL_ALONE, schedule=only),
            Method(name=UNIFORM_ALONE, schedule=Uniform.of_equal_bytes(only, cohort, STEPS), rate_as=UNIFORM, matches=KL_ALONE),
        )
    return Setting(title=title, hidden=hidden, labels=labels, cohort=cohort, methods=(*methods, *extra))


def curve() -> tuple[Method, ...]:
    """More points of accuracy against cost ratio for row 1."""
    return (
        _FEDSGD,
        *(Method(name=f"uniform, {plural(u, 'upload')}", schedule=Uniform(uploads=u), rate_as=UNIFORM) for u in (2, 4)),
        *(Method(name=f"KL group, high {high}", schedule=DynamicFL(high=high, budget=0.3), rate_as=KL) for high in (4, 16)),
    )


def equal_time(title: str, labels: int) -> Setting:
    """A fast client uploads 64 times while a slow one uploads once; uniform schedules wait for the slow ones, so they get fewer rounds."""
    methods = (
        *(Method(name=f"uniform, {plural(u, 'upload')}", schedule=Uniform(uploads=u), rounds=ROUNDS // u) for u in (1, 2, 4, 10, 20)),
        Method(name="every fast client", schedule=EveryFastClient(high=1), rate_as=KL),
        Method(name=KL, schedule=DynamicFL(high=1, budget=1.0, clients="by-link")),
    )
    return Setting(title=title, hidden=MLP, labels=labels, cohort=10, methods=methods, fast_share=0.3)


def claims(everything: Sequence[Results], first: Results, covered: Results, timed: Results) -> list[Claim]:
    uniforms = [name for name in timed if name.startswith("uniform")]
    best = max(uniforms, key=lambda name: fmean(timed[name].finals))
    return [
        Claim.measured("row 1: KL group - FedAvg", _gap(first, KL, "FedAvg"), bar=">= 8 points", note=_beside(first, KL, UNIFORM)),
        Claim.measured(
            "row 4: only the KL group - uniform of equal bytes",
            _gap(covered, KL_ALONE, UNIFORM_ALONE),
            bar=">= 2 points",
            note=_beside(covered, KL, UNIFORM),
        ),
        Claim.measured(
            "(iv): DynamicFL - best uniform at equal simulated time",
            _gap(timed, KL, best),
            bar=">= 10 points",
            note=f"the best is {best}; every fast client, without a choice, has {fmean(timed['every fast client'].finals):.1f}",
        ),
        Claim(
            name="largest byte mismatch of a uniform row",
            value=max(map(_mismatch, everything)),
            spread=nan,
            bar="<= 2 %",
            seeds=len(first[KL].curves),
        ),
    ]


def _gap(results: Results, better: str, base: str) -> list[float]:
    """Difference of accuracy by seed, in points."""
    return [a - b for a, b in zip(results[better].finals, results[base].finals, strict=True)]


def _beside(results: Results, method: str, uniform: str) -> str:
    own, other = fmean(results[method].finals), fmean(results[uniform].finals)
    return f"at equal bytes {method} has {own:.1f}, uniform {other:.1f}" + (": uniform wins" if other > own else "")


def _mismatch(results: Results) -> float:
    """Largest difference in bytes between a uniform schedule and what it is matched with, in percent of the latter."""
    pairs = [(a, b) for r in results.values() if r.method.matches for a, b in zip(r.curves, results[r.method.matches].curves, strict=True)]
    return max((100 * abs(a.bytes[-1] / b.bytes[-1] - 1) for a, b in pairs), default=0.0)


_COLOURS = {
    "FedAvg": GREY,
    "FedSGD": PURPLE,
    "random group": ORANGE,
    KL: BLUE,
    UNIFORM: RED,
    KL_ALONE: GREEN,
    UNIFORM_ALONE: SKY,
    "every fast client": SKY,
    "uniform, 1 upload": GREY,
    "uniform, 2 uploads": RED,
    "uniform, 4 uploads": ORANGE,
    "uniform, 10 uploads": GREEN,
    "uniform, 20 uploads": PURPLE,
}


@styled
def draw_bytes(first: Results, covered: Results, path: Path) -> None:
    drawn = figure(WIDE, 3.4)
    axes = drawn.subplots(1, 2, sharey=True)
    rows = (
        (first, ("FedAvg", "random group", KL, UNIFORM, "FedSGD"), "One label a client, group 3 of 10, high 1"),
        (covered, ("FedAvg", KL, UNIFORM, KL_ALONE, UNIFORM_ALONE), "Group 10 of 20 covers the labels, high 8"),
    )
    for panel, (results, names, title) in zip(axes, rows, strict=True):
        for name in names:
            _line(panel, results[name], "bytes", 1e-6)
        panel.set(title=title, xlabel="MB sent and received so far", xscale="log")
        plain_log(panel)
        panel.legend(loc="lower right", fontsize=7)
    axes[0].set(ylabel="test accuracy, %", ylim=(0, 100))
    save_figure(drawn, path)


@styled
def draw_time(timed: Results, path: Path) -> None:
    drawn = figure(WIDE * 0.65, 3.4)
    axes = drawn.subplots()
    for name in timed:
        _line(axes, timed[name], "clock", 1.0, marker="o")
    axes.set(
        title="Equal simulated time, 30 % of links 64 times faster", xlabel="simulated seconds", ylabel="test accuracy, %", ylim=(0, 100)
    )
    axes.legend(loc="upper left", fontsize=7)
    save_figure(drawn, path)


@styled
def draw_ratio(first: Results, path: Path) -> None:
    """Accuracy against cost ratio: uniform schedules from FedAvg to FedSGD, and the KL group at several intervals."""
    drawn = figure(WIDE * 0.65, 3.4)
    axes = drawn.subplots()
    lines = (
        ("uniform", RED, ("FedAvg", "uniform, 2 uploads", "uniform, 4 uploads", UNIFORM, "FedSGD")),
        (KL, BLUE, ("KL group, high 16", "KL group, high 4", KL)),
    )
    for label, colour, names in lines:
        ratios = [first[n].mean("cost_ratio").mean() for n in names]
        finals = [fmean(first[n].finals) for n in names]
        axes.errorbar(
            ratios, finals, [standard_error(first[n].finals) for n in names], color=colour, marker="o", markersize=4, capsize=2, label=label
        )
    axes.set(title="Row 1: accuracy against cost ratio", xlabel="uploads / (cohort x local steps)", ylabel="test accuracy, %", xscale="log")
    plain_log(axes)
    axes.legend(loc="lower right")
    save_figure(drawn, path)


def _line(axes: Axes, result: Result, across: str, scale: float, marker: str = "") -> None:
    name = result.method.name
    axes.plot(scale * result.mean(across), 100 * result.mean("accuracy"), color=_COLOURS[name], label=name, marker=marker, markersize=2.5)


if __name__ == "__main__":
    sys.exit(main("communication", run))
