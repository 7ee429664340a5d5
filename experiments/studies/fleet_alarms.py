"""Which of many streams have changed? Decisions at every tick with a bounded false share, up to a million streams.

Standard normal streams, some of which gain one standard deviation. e-BH (arXiv:2009.02824) on e-processes that stop when their stream is
discovered keeps the false share of the *whole history* of discoveries below its level. A threshold for each stream has no such promise: it is
compared at the one value that gives it the same measured false share, which only one who knows what changed could choose. BH on
``exp(-Z)``, a p-value at one tick fixed beforehand, rejects in every quiet fleet if one looks at every tick.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import log, nan, sqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from detection import CUSUM, Gaussian, exact_threshold
from detection.detector import Detector, Mask
from detection.discoveries import StoppedEBH
from detection.e_power import AdjustedEProcess, UniformPrior, closed_e_bh, log_boost
from detection.e_processes import EProcess, e_bh
from experiments.fleets import (
    NEVER,
    Array,
    Peaks,
    Scores,
    Ticks,
    changes,
    discovered,
    error,
    matched,
    observations,
    scores,
    thresholded,
)
from experiments.study import Claim, main, save_figure
from fedsim.randomness import rng_for
from fedsim.runs.style import BLUE, DASHES, GREEN, INK, MARKERS, ORANGE, PURPLE, WIDE, figure, styled
from fedsim.runs.text import aligned, size

ALPHA = 0.1
FALSE, POWER, SECONDS, MEMORY, EQUAL, SLOWER, ALWAYS, RARELY = (
    "<= 0.1 of the discoveries",
    ">= 0.8 of the changed",
    "<= 90 s",
    "<= 200 MB",
    ">= 0.9 of the thresholds'",
    "<= 1.25 x the thresholds'",
    ">= 0.99 of the runs",
    "<= 0.1 of the runs",
)

MILLION, STREAMS, TICKS, FIRST, LAST = 1_000_000, 2_000, 200, 51, 150  # one stream in a hundred changes at a tick from FIRST to LAST
CHANGED, QUIET, LOOK = 100, 110, 150  # the single look: after LOOK ticks, 40 after the change
NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
LOCAL = CUSUM(pre=NULL, post=SHIFTED, threshold=log(10_000))
PLAIN = EProcess.of(LOCAL, ALPHA)
WINDOW = EProcess.at_level(ALPHA, increment=LOCAL.increment, prior=UniformPrior(horizon=TICKS))
ADJUSTED = AdjustedEProcess(process=WINDOW, threshold=WINDOW.threshold)
PROCESSES: dict[str, Detector[Any]] = {"e-BH": PLAIN, "e-BH, uniform prior": WINDOW, "e-BH, uniform prior, adjusted": ADJUSTED}
ARLS = (10_000, 100_000)
HEADER = ["rule", "false share", "highest at any tick", "power", "delay"]


def run(quick: bool, out: Path) -> list[Claim]:
    """200 replications and one fleet of a million with ``quick``, else 1,000 and three."""
    num = 200 if quick else 1_000
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:  # whose peak of memory is that of nothing else
        largest = own.submit(million, 1 if quick else 3).result()
    rules, peaks = history(num)
    looked, claims = look(num)
    first = first_rejections(100 if quick else 400)
    print_scores(f"{STREAMS:,} streams x {TICKS} ticks, 20 changed at tick {FIRST} to {LAST}, decided at every tick, {num} fleets", rules)
    print_scores(f"{STREAMS:,} streams, {CHANGED} changed {LOOK - QUIET} ticks before one look, {num} fleets", looked)
    draw(rules, peaks, first, out / "fleet_alarms.png")
    return [*largest, *history_claims(rules, num), *claims, *looking_claims(first)]


def million(num: int) -> list[Claim]:
    """A million streams, decided at every tick; observations are drawn within the time."""
    rule, found_scores, seconds = StoppedEBH(process=PLAIN, alpha=ALPHA), [], []
    before = peak_bytes()
    for fleet in range(num):
        start = time.perf_counter()
        nu = changes(rng_for(0, "million, changes", fleet), MILLION, MILLION // 100, FIRST, LAST)
        state = rule.init(MILLION)
        for x in observations("million", fleet, nu, TICKS):
            state = rule.step(state, x)
        seconds.append(time.perf_counter() - start)
        found_scores.append((state.found, nu))
    memory = peak_bytes() - before
    start = time.perf_counter()
    e_bh(log_e=PLAIN.log_e(state.process), alpha=ALPHA)
    deciding = 1e3 * (time.perf_counter() - start)
    measured = scores("e-BH", found_scores)
    name = f"{MILLION:,} streams x {TICKS} ticks"
    print(
        f"{name}, 10,000 changed: false share {measured.false.mean():.5f} (highest at any tick {measured.highest.mean():.3f}), power "
        f"{measured.power.mean():.4f}, delay {measured.delay.mean():.1f}, {np.mean(seconds):.0f} s, {size(memory)} above the start\n",
        flush=True,
    )
    note = f"decided at every tick, drawing the observations included; the last decision took {deciding:.0f} ms, most of it log E"
    return [
        Claim.measured(f"{name}: false share of all discoveries", measured.false.tolist(), bar=FALSE),
        Claim.measured(f"{name}: power", measured.power.tolist(), bar=POWER),
        Claim.measured(f"{name}: one core", seconds, bar=SECONDS, note=note),
        Claim(name=f"{name}: peak memory above the start", value=memory / 1e6, spread=nan, bar=MEMORY, seeds=num),
    ]


def history(num: int) -> tuple[dict[str, Scores], list[Peaks]]:
    """All discoveries over time. The last threshold has the false share measured for e-BH with the uniform prior."""
    rules = [StoppedEBH(process=process, alpha=ALPHA) for process in PROCESSES.values()]
    found: list[list[tuple[Ticks, Ticks]]] = [[] for _ in rules]
    peaks = []
    for fleet in range(num):
        nu = changes(rng_for(0, "history, changes", fleet), STREAMS, STREAMS // 100, FIRST, LAST)
        ticks, local = discovered(rules, LOCAL, "history", fleet, nu, TICKS)
        peaks.append(local)
        for rows, each in zip(found, ticks, strict=True):
            rows.append((each, nu))
    table = {name: scores(name, rows) for name, rows in zip(PROCESSES, found, strict=True)}
    for arl in ARLS:
        table[f"ARL {arl:,}"] = thresholded(f"CUSUM, ARL {arl:,}", peaks, exact_threshold(LOCAL.increment, (NULL,), arl))
    for name in ("e-BH", "e-BH, uniform prior"):
        table[f"{name}, matched"] = matched(f"CUSUM, false share of '{name}'", peaks, float(table[name].false.mean()))
    return table, peaks


def look(num: int) -> tuple[dict[str, Scores], list[Claim]]:
    """One look at a tick fixed beforehand: what a prior, the closure and a boost add; and streams that share half of their variance."""
    boost = log_boost(PLAIN, NULL, SHIFTED, alpha=ALPHA, streams=STREAMS, tick=LOOK, rng=rng_for(0, "boost"))
    selections: dict[str, Callable[[Array, Array], Mask]] = {
        "e-BH": lambda plain, window: e_bh(log_e=plain, alpha=ALPHA),
        "closed e-BH": lambda plain, window: closed_e_bh(plain, ALPHA),
        "boosted e-BH": lambda plain, window: e_bh(log_e=plain + boost, alpha=ALPHA),
        "e-BH, uniform prior": lambda plain, window: e_bh(log_e=window, alpha=ALPHA),
        "closed e-BH, uniform prior": lambda plain, window: closed_e_bh(window, ALPHA),
        "Bonferroni": lambda plain, window: plain >= log(STREAMS / ALPHA),
    }
    nu = np.where(np.arange(STREAMS) < CHANGED, QUIET + 1, NEVER)
    evidence = [looked("look", fleet, nu) for fleet in range(num)]
    table = {name: scores(name, [(LOOK * select(*each), nu) for each in evidence]) for name, select in selections.items()}
    shared = [(LOOK * e_bh(log_e=looked("correlated", fleet, nu, 0.5)[1], alpha=ALPHA), nu) for fleet in range(num)]
    worst = max(table.values(), key=lambda rule: float(rule.false.mean()))
    return table, [
        Claim.measured("one look: highest FDR of six rules", worst.false.tolist(), bar=FALSE, note=worst.name),
        Claim.measured("one look: FDR, streams correlated 0.5", scores("correlated", shared).false.tolist(), bar=FALSE),
        Claim.measured("one look: power of e-BH", table["e-BH"].power.tolist(), bar=POWER),
    ]


def looked(purpose: str, fleet: int, nu: Ticks, correlation: float = 0.0) -> tuple[Array, Array]:
    """``log E`` (N,) at the look, with either prior."""
    plain, window = PLAIN.init(len(nu)), WINDOW.init(len(nu))
    for x in observations(purpose, fleet, nu, LOOK, correlation):
        plain, window = PLAIN.step(plain, x), WINDOW.step(window, x)
    return PLAIN.log_e(plain), WINDOW.log_e(window)


def history_claims(rules: dict[str, Scores], num: int) -> list[Claim]:
    claims = [Claim.measured(f"{name}, all discoveries: FDR", rules[name].false.tolist(), bar=FALSE) for name in PROCESSES]
    claims += [Claim.measured(f"{name}: highest false share at any tick", rules[name].highest.tolist(), bar=FALSE) for name in PROCESSES]
    ours, theirs = rules["e-BH, uniform prior"], rules["e-BH, uniform prior, matched"]
    plain, its = rules["e-BH"].delay.mean(), rules["e-BH, matched"].delay.mean()
    fdr = (
        f"uniform prior; measured FDR {ours.false.mean():.4f} and {theirs.false.mean():.4f}, the threshold chosen knowing what changed. "
        f"The prior without a horizon is slower: delay {plain:.1f} against {its:.1f}"
    )
    comparisons = (("power", ours.power, theirs.power, EQUAL), ("delay", ours.delay, theirs.delay, SLOWER))
    return claims + [
        Claim(name=f"{what} at equal measured FDR, e-BH / thresholds", value=ratio(a, b), spread=spread(a, b), bar=bar, seeds=num, note=fdr)
        for what, a, b, bar in comparisons
    ]


def ratio(a: Array, b: Array) -> float:
    return float(a.mean() / b.mean())


def spread(a: Array, b: Array) -> float:
    """Standard error of the ratio of means, as if the two were independent: a little too wide, for they share their fleets."""
    return ratio(a, b) * sqrt((error(a) / a.mean()) ** 2 + (error(b) / b.mean()) ** 2)


def first_rejections(num: int) -> dict[str, Ticks]:
    """Quiet fleets of 500 looked at after each of 600 ticks: the first tick (num,) at which anything is rejected, ``NEVER`` for none."""
    first = {name: np.full(num, NEVER) for name in ("BH on exp(-Z)", "e-BH")}
    for fleet in range(num):
        state = PLAIN.init(500)
        for tick, x in enumerate(observations("quiet", fleet, np.full(500, NEVER), 600), start=1):
            state = PLAIN.step(state, x)
            rejects = (benjamini_hochberg(np.exp(-state.cusum.statistic)), e_bh(log_e=PLAIN.log_e(state), alpha=ALPHA).any())
            for ticks, rejected in zip(first.values(), rejects, strict=True):
                ticks[fleet] = min(ticks[fleet], tick) if rejected else ticks[fleet]
    return first


def looking_claims(first: dict[str, Ticks]) -> list[Claim]:
    by_p, by_e = ((ticks < NEVER).astype(float).tolist() for ticks in first.values())
    return [
        Claim.measured("negative control: BH on exp(-Z) at every tick rejects in a quiet fleet", by_p, bar=ALWAYS),
        Claim.measured("e-BH at every tick rejects in a quiet fleet", by_e, bar=RARELY),
    ]


def benjamini_hochberg(p: Array) -> bool:
    """Whether BH at the level rejects anything."""
    return bool((np.sort(p) <= ALPHA * np.arange(1, len(p) + 1) / len(p)).any())


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def print_scores(title: str, rules: dict[str, Scores]) -> None:
    print(f"{title}\n{aligned(HEADER, [rule.cells() for rule in rules.values()])}\n", flush=True)


@styled
def draw(rules: dict[str, Scores], peaks: Sequence[Peaks], first: dict[str, Ticks], path: Path) -> None:
    """Delay against the measured false share; and the share of quiet fleets in which looking at every tick has rejected something."""
    drawn = figure(WIDE, 3.2)
    left, right = drawn.subplots(1, 2)
    curve = [thresholded("", peaks, threshold) for threshold in np.linspace(5.0, 16.0, 23)]
    left.plot([r.false.mean() for r in curve], [r.delay.mean() for r in curve], color=ORANGE, label="one threshold for all, every value")
    for name, marker, colour in zip(PROCESSES, MARKERS, (BLUE, GREEN, PURPLE), strict=False):
        rule = rules[name]
        left.errorbar(
            rule.false.mean(),
            rule.delay.mean(),
            2 * error(rule.delay),
            2 * error(rule.false),
            color=colour,
            fmt=marker,
            capsize=2,
            label=name,
        )
    left.axvline(ALPHA, color=INK, linewidth=0.8)
    left.set_xscale("symlog", linthresh=1e-3)
    left.set(title="Delay at a measured false share", xlabel="false share of all discoveries", ylabel="mean delay, observations")
    left.set(xlim=(-1e-4, 1.0))
    left.legend(loc="lower left", fontsize=7)
    ticks = np.arange(1, 601)
    for (name, found), colour, dashes in zip(first.items(), (ORANGE, BLUE), DASHES, strict=False):
        right.plot(ticks, (found[:, None] <= ticks).mean(axis=0), color=colour, linestyle=dashes, label=name)
    right.axhline(ALPHA, color=INK, linewidth=0.8)
    right.set(title="Quiet fleets with a rejection so far", xlabel="ticks looked at", ylabel="share of fleets", ylim=(0.0, 1.02))
    right.legend(loc="center right")
    save_figure(drawn, path)


if __name__ == "__main__":
    sys.exit(main("fleet_alarms", run))
