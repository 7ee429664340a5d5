"""What the detectors promise: equality with CUSUM, run lengths, and delays where the change is not the one designed for.

SCUSUM with the right multiplier is CUSUM; a calibrated threshold keeps its average run length (ARL) when simulated afresh; a robust
design (arXiv:2407.11094) has the least *worst* delay and pays for it at strong changes. Every delay comes from the exact chain and from
simulation; both count observations used, so 1 is an alarm on the first changed value. Nothing is clipped but in the fleet's design.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np

from detection import (
    CUSUM,
    Gaussian,
    GaussianBox,
    Law,
    ReflectedSum,
    RobustScoreCUSUM,
    ScoreCUSUM,
    Singleton,
    confidence_box,
    default_post,
    exact_run_length,
    exact_threshold,
)
from detection.run_length import worst_delay, worst_null
from experiments.run_lengths import Curve, path_of, short, simulated
from experiments.study import Claim, main, save_figure
from fedsim.randomness import rng_for
from fedsim.runs.style import BLUE, DASHES, GREEN, INK, MARKERS, ORANGE, WIDE, figure, styled
from fedsim.runs.text import aligned, number

EQUAL, WITHIN, AGREES, WORST, BOX = (
    "<= 0.000000001",
    "<= 0.1 of the target",
    "<= 4 standard errors",
    "<= 0.7 of the next",
    "<= 0.5 of the centres'",
)

NULL = Gaussian(0.0, 1.0)
SAMPLES, VARIANCES = 100_000, (0.3, 1.0, 2.7)
TARGETS = (1_000, 10_000)
TRUE_SHIFTS = (0.5, 0.6, 0.75, 1.0, 1.5, 2.0)
PRE = GaussianBox(mean=(-0.2, 0.2), variance=(0.8, 1.25))
POST = GaussianBox(mean=(0.8, 3.0), variance=(0.8, 3.0))


def run(quick: bool, out: Path) -> list[Claim]:
    """2,000 runs a point with ``quick``, else 10,000."""
    num = 2_000 if quick else 10_000
    equal = equality()
    calibrated = run_lengths_afresh(num)
    curves = misspecified(num)
    draw(curves, out / "delay_by_true_shift.png")
    return [equal, *calibrated, *curve_claims(curves, num), box_claim(num)]


def equality() -> Claim:
    """Two detectors, one stream with a change of mean half-way, restarted at each alarm."""
    rows, worst = [], 0.0
    for variance in VARIANCES:
        pre, post = Singleton(Gaussian(0.0, variance)), Singleton(Gaussian(1.0, variance))
        score = ScoreCUSUM.fit(pre=pre, post=post, arl=1000, clip=None)
        likelihood = CUSUM.fit(pre=pre, post=post, arl=1000, clip=None)
        stream = sqrt(variance) * rng_for(0, "equality").standard_normal(SAMPLES)
        stream[SAMPLES // 2 :] += 1.0
        (first, alarms), (second, others) = path_of(score, stream), path_of(likelihood, stream)
        gap = float(np.abs(first - second).max())
        worst = max(worst, gap)
        rows.append([number(variance), f"{score.multiplier:.15g}", f"{alarms:,}", f"{others:,}", f"{first.max():.2f}", f"{gap:.1e}"])
    header = ["variance", "multiplier", "SCUSUM alarms", "CUSUM alarms", "highest", "max difference"]
    print(f"SCUSUM against CUSUM, {SAMPLES:,} samples, a shift of 1 half-way\n{aligned(header, rows)}\n", flush=True)
    note = f"{worst:.1e}, the worst of the variances {', '.join(map(str, VARIANCES))}"
    return Claim(name="SCUSUM minus CUSUM, largest in 100,000 samples", value=worst, spread=float("nan"), bar=EQUAL, seeds=1, note=note)


def run_lengths_afresh(num: int) -> list[Claim]:
    """Runs watched for three targets at most: about 5 % end without an alarm, and are censored."""
    pre = confidence_box(n=100)
    rows, claims = [], []
    for target in TARGETS:
        known = ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(1.0, 1.0)), arl=target, clip=None)
        fleet = RobustScoreCUSUM.fit(pre=pre, post=default_post(pre), arl=target)
        nulls: tuple[tuple[str, ReflectedSum, Law], ...] = (
            ("known laws", known, NULL),
            ("fleet's robust design", fleet, worst_null(fleet.increment, pre.extreme(), fleet.threshold)[0]),
        )
        for name, detector, law in nulls:
            runs = simulated(detector, law, num, 3 * target, f"run length {name} {target}")
            ratio, error = runs.mean / target, runs.error / target
            short = np.minimum(runs.ticks, target).mean() / target
            rows.append(
                [
                    name,
                    f"{target:,}",
                    number(detector.threshold),
                    f"{ratio:.3f} +- {error:.3f}",
                    str(int(runs.censored.sum())),
                    f"{short:.3f}",
                ]
            )
            title = f"ARL {target:,} simulated afresh, {name}: |ratio - 1|"
            claims.append(Claim(name=title, value=abs(ratio - 1), spread=error, bar=WITHIN, seeds=num))
    header = ["design", "target ARL", "threshold", "simulated / target", "censored", "mean of min(T, target), / target"]
    print(f"Run lengths in control, {num:,} runs (the last column is the biased way)\n{aligned(header, rows)}\n", flush=True)
    return claims


def misspecified(num: int) -> list[Curve]:
    """Designs for shifts of 0.5 (least favourable), 1 and 1.5 at exact ARL 10,000, against true shifts they were not made for."""
    every = GaussianBox(mean=(TRUE_SHIFTS[0], TRUE_SHIFTS[-1]), variance=(1.0, 1.0))
    designs: dict[str, ReflectedSum] = {
        "robust (0.5)": RobustScoreCUSUM.fit(pre=Singleton(NULL), post=every, clip=None),
        **{
            f"design {shift:g}": ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(shift, 1.0)), clip=None)
            for shift in (1.0, 1.5)
        },
    }
    laws = [Gaussian(shift, 1.0) for shift in TRUE_SHIFTS]
    curves = [
        Curve(
            name=name,
            exact=tuple(exact_run_length(detector.increment, law, detector.threshold) for law in laws),
            simulated=tuple(simulated(detector, law, num, 100_000, f"delay {name} {law.mean}") for law in laws),
        )
        for name, detector in designs.items()
    ]
    rows = [
        [f"{shift:g}", *(f"{c.exact[k]:.1f} ({c.simulated[k].mean:.1f} +- {c.simulated[k].error:.1f})" for c in curves)]
        for k, shift in enumerate(TRUE_SHIFTS)
    ]
    header = ["true shift", *(c.name for c in curves)]
    print(f"Mean delay at ARL 10,000: exact (simulated, {num:,} runs)\n{aligned(header, rows)}\n", flush=True)
    return curves


def curve_claims(curves: Sequence[Curve], num: int) -> list[Claim]:
    robust, *others = curves
    nearest = min(others, key=lambda c: max(c.exact))
    own, next_best = (max(c.simulated, key=lambda r: r.mean) for c in (robust, nearest))
    ratio = own.mean / next_best.mean
    error = ratio * sqrt((own.error / own.mean) ** 2 + (next_best.error / next_best.mean) ** 2)
    price = robust.exact[-1] / min(c.exact[-1] for c in others)
    deviation = max(abs(d) for c in curves for d in c.deviations)
    return [
        Claim(
            name="worst delay over shifts 0.5 to 2, robust / next best",
            value=max(robust.exact) / max(nearest.exact),
            spread=float("nan"),
            bar=WORST,
            seeds=1,
            note=f"exact chain; simulated {ratio:.3f} +- {error:.3f}. At a shift of 2 the robust design takes {price:.2f} x the best one's delay",
        ),
        Claim(name="simulated against exact delays, largest deviation", value=deviation, spread=float("nan"), bar=AGREES, seeds=num),
    ]


def box_claim(num: int) -> Claim:
    """Mean and variance uncertain before and after; both thresholds give exactly ARL 1,000 under the worst law before the change."""
    robust = RobustScoreCUSUM.fit(pre=PRE, post=POST, arl=1000, clip=None)
    unaware = ScoreCUSUM.fit(pre=PRE, post=POST, arl=1000, clip=None)  # for the two centres, with a promise there alone
    centres = replace(unaware, threshold=exact_threshold(unaware.increment, PRE.extreme(), 1000))
    rows, worst = [], {}
    for name, detector in {"robust pair": robust, "pair of centres": centres}.items():
        law, delay = worst_delay(detector.increment, POST.extreme(), detector.threshold)
        runs = simulated(detector, law, num, 100_000, f"box {name}")
        null, arl = worst_null(detector.increment, PRE.extreme(), detector.threshold)
        middle = exact_run_length(detector.increment, POST.centre(), detector.threshold)
        worst[name] = delay
        rows.append(
            [
                name,
                f"{arl:,.0f} at {short(null)}",
                f"{delay:.1f} at {short(law)}",
                f"{runs.mean:.1f} +- {runs.error:.1f}",
                f"{middle:.1f}",
            ]
        )
    header = ["design", "worst ARL", "worst delay, exact", "simulated", "delay at the centre"]
    broken = worst_null(unaware.increment, PRE.extreme(), unaware.threshold)[1]
    print(f"Both sets uncertain, worst-case ARL 1,000\n{aligned(header, rows)}\n", flush=True)
    return Claim(
        name="box: worst delay at equal worst ARL, robust / centres",
        value=worst["robust pair"] / worst["pair of centres"],
        spread=float("nan"),
        bar=BOX,
        seeds=1,
        note=f"exact chain. Calibrated at its own centre, the pair of centres has ARL {broken:,.0f} at the worst law instead of 1,000",
    )


@styled
def draw(curves: Sequence[Curve], path: Path) -> None:
    """Lines by the exact chain, points simulated; the worst point of each design carries its delay."""
    drawn = figure(WIDE * 0.65, 3.4)
    axes = drawn.subplots()
    for curve, colour, marker, dashes in zip(curves, (BLUE, ORANGE, GREEN), MARKERS, DASHES, strict=False):
        means = [runs.mean for runs in curve.simulated]
        axes.plot(TRUE_SHIFTS, curve.exact, color=colour, linestyle=dashes, label=curve.name)
        axes.errorbar(TRUE_SHIFTS, means, [2 * runs.error for runs in curve.simulated], color=colour, fmt=marker, markersize=3.5, capsize=2)
        at = int(np.argmax(curve.exact))
        axes.plot(TRUE_SHIFTS[at], curve.exact[at], "o", markersize=10, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=0.8)
        axes.annotate(f"{curve.exact[at]:.0f}", (TRUE_SHIFTS[at], curve.exact[at]), (9, 5), textcoords="offset points", color=colour)
    axes.set(
        title="Delay at one false alarm in 10,000 ticks", xlabel="true shift of the mean", ylabel="mean delay, observations", yscale="log"
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(loc="upper right")
    save_figure(drawn, path)


if __name__ == "__main__":
    sys.exit(main("detection", run))
