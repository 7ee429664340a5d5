"""Robust score-based detection where densities are awkward: Boltzmann machines, exactly and by learned scores; arXiv:2407.11094.

The change may go any of three ways (a hull of three laws). The robust detector is built on the least favourable mixture; the others on one of
the three laws, right or wrong. All have the same *measured* run length in control, and every delay is that of at least 2,000 runs on
observations that no design has seen. A learned detector never sees a law: 20,000 observations of each give it scores and a classifier.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from detection import (
    GaussBernoulliRBM,
    Gaussian,
    GaussianBox,
    Increment,
    Law,
    MixtureHull,
    RobustScoreCUSUM,
    RunLengths,
    SampledSet,
    ScanB,
    ScoreCUSUM,
    Singleton,
    calibrated,
    exact_run_length,
    sampled_divergence,
)
from detection.hulls import ObservedLaw
from detection.score_matching import fit_score
from experiments.run_lengths import simulated
from experiments.study import Claim, main, save_figure
from fedsim.randomness import rng_for
from fedsim.runs.style import BLUE, DASHES, GREEN, INK, MARKERS, ORANGE, WIDE, figure, styled
from fedsim.runs.text import aligned

WITHIN, SLOPE, WORST, BELOW = "<= 1 of the bound", "<= 0.05", "<= 0.7 of the next", "< 1 of Scan-B"

VISIBLE, HIDDEN = 6, 6
SMALL, LARGE, COSINE = 0.2, 1.0, 0.5  # Fisher divergences from the law before, and the cosine of the two directions
ARL, TRAIN, POOL = 1_000, 20_000, 60_000
THRESHOLDS = (4.0, 5.0, 6.0, 7.0, 8.0)
SCAN_ARLS = (200, 500, 1_000, 2_000)
COLOURS = (BLUE, ORANGE, GREEN, INK)
Pools = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A design: its threshold at the common run length, and for each true law the drift, the mean delay and its standard error."""

    name: str
    threshold: float
    drift: dict[str, float]
    delay: dict[str, float]
    error: dict[str, float]

    @property
    def worst(self) -> float:
        """Longest mean delay; ``inf`` where the statistic drifts down and no alarm is owed."""
        return max(self.delay.values())


def run(quick: bool, out: Path) -> list[Claim]:
    """2,000 runs a point with ``quick``, else 10,000."""
    num = 2_000 if quick else 10_000
    null, laws = machines()
    pools = {name: law.sample(rng_for(0, "robust", "pool", name), POOL) for name, law in {"null": null, **laws}.items()}
    claims, rows = gaussian_claims(num), {}
    for family, (least, designs) in (("exact scores", exact_designs(null, laws)), ("learned scores", learned_designs(null, laws))):
        rows[family] = [measured(name, z, pools, num, family) for name, z in designs.items()]
        print(f"Boltzmann machines, {family}, measured ARL {ARL:,}\n{described(rows[family])}\n", flush=True)
        claims += family_claims(family, designs["robust"], least, rows[family], pools, num)
    draw(rows, out / "boltzmann_delays.png")
    return [*claims, *scan_claims(null, laws["small, one way"], num)]


def machines() -> tuple[GaussBernoulliRBM, dict[str, GaussBernoulliRBM]]:
    """The law before the change, and three after it, whose weights moved in one of two directions to a given Fisher divergence."""
    rng = rng_for(0, "robust", "machines")
    weights, one, apart = (rng.standard_normal((VISIBLE, HIDDEN)) for _ in range(3))
    weights, other = 0.5 * weights, COSINE * one + sqrt(1 - COSINE**2) * apart
    biases = 0.3 * rng.standard_normal(VISIBLE), 0.3 * rng.standard_normal(HIDDEN)
    null = GaussBernoulliRBM(weights, *biases)

    def moved(direction: np.ndarray, divergence: float) -> GaussBernoulliRBM:
        def excess(far: float) -> float:
            law = GaussBernoulliRBM(weights + far * direction, *biases)
            return sampled_divergence(law, null, rng_for(0, "robust", "move"), 20_000).value - divergence

        return GaussBernoulliRBM(weights + float(brentq(excess, 0.0, 2.0, xtol=1e-4)) * direction, *biases)

    return null, {
        "small, one way": moved(one, SMALL),
        "small, another": moved(other, SMALL),
        "large, one way": moved(one, LARGE),
    }


def exact_designs(null: Law, laws: Mapping[str, GaussBernoulliRBM]) -> tuple[float, dict[str, Increment]]:
    """The certified drift of the robust design, and increments, multiplier included, from the laws themselves."""
    rng = rng_for(0, "robust", "exact")
    pre = Singleton(null)
    robust = RobustScoreCUSUM.fit(pre=pre, post=MixtureHull(tuple(laws.values())), arl=ARL, clip=None, method="floor", rng=rng)
    print(
        f"exact scores: divergence {robust.pair.divergence:.4f}, loss of drift at most {robust.pair.gap:.1e}, {robust.pair.weights}",
        flush=True,
    )
    single = {
        f"for '{name}'": ScoreCUSUM.fit(pre=pre, post=Singleton(law), arl=ARL, clip=None, method="floor", rng=rng).increment
        for name, law in laws.items()
    }
    return robust.multiplier * (robust.pair.divergence - robust.pair.gap), {"robust": robust.increment, **single}


def learned_designs(null: Law, laws: Mapping[str, Law]) -> tuple[float, dict[str, Increment]]:
    """The same from 20,000 observations of each law: denoising score matching, and a classifier that weighs the scores of a mixture."""
    samples = {name: law.sample(rng_for(0, "robust", "train", name), 2 * TRAIN) for name, law in {"null": null, **laws}.items()}
    scores = {name: fit_score(x[:TRAIN], seed=0) for name, x in samples.items()}
    rest = {name: x[TRAIN:] for name, x in samples.items()}
    rng, pre = rng_for(0, "robust", "learned"), Singleton(ObservedLaw(scores["null"], rest["null"]))
    hull = SampledSet(
        samples=tuple(rest[name] for name in laws),
        laws=tuple(scores[name] for name in laws),
        posterior=classifier([samples[name][:TRAIN] for name in laws]),
    )
    robust = RobustScoreCUSUM.fit(pre=pre, post=hull, arl=ARL, clip=None, method="floor", rng=rng)
    print(
        f"learned scores: divergence {robust.pair.divergence:.4f}, loss of drift at most {robust.pair.gap:.1e}, {robust.pair.weights}",
        flush=True,
    )
    single = {
        f"for '{name}'": ScoreCUSUM.fit(
            pre=pre, post=Singleton(ObservedLaw(scores[name], rest[name])), arl=ARL, clip=None, method="floor", rng=rng
        ).increment
        for name in laws
    }
    return robust.multiplier * (robust.pair.divergence - robust.pair.gap), {"robust": robust.increment, **single}


def classifier(samples: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Probabilities of the classes of ``samples``, equally likely beforehand, from a small network."""
    from sklearn.neural_network import MLPClassifier

    x, y = np.concatenate(samples), np.repeat(np.arange(len(samples)), [len(s) for s in samples])
    network = MLPClassifier((64, 64), early_stopping=True, max_iter=40, random_state=0).fit(x, y)
    return lambda points: np.asarray(network.predict_proba(points), dtype=np.float64)


def measured(name: str, z: Increment, pools: Pools, num: int, family: str) -> Row:
    """Threshold by simulated runs in control, then delays of ``num`` runs under each true law, from the pools' increments."""
    values = {law: z(x) for law, x in pools.items()}
    threshold = in_control(values["null"], num, f"{family} {name}").threshold(ARL, certified=False)
    drift = {law: float(v.mean()) for law, v in values.items() if law != "null"}
    runs = {law: delays(values[law], threshold, num, f"{family} {name} {law}") if mean > 0 else None for law, mean in drift.items()}
    return Row(
        name=name,
        threshold=threshold,
        drift=drift,
        delay={law: float("inf") if r is None else float(r.mean()) for law, r in runs.items()},
        error={law: float("nan") if r is None else float(r.std(ddof=1) / sqrt(num)) for law, r in runs.items()},
    )


def in_control(values: np.ndarray, num: int, purpose: str) -> RunLengths:
    """Run lengths at every threshold, of ``num`` runs of 2,000 ticks."""
    rng = rng_for(0, "robust", "control", purpose)
    return RunLengths.of(values[rng.integers(len(values), size=(num, 2 * ARL))])


def delays(values: np.ndarray, threshold: float, num: int, purpose: str, most: int = 20_000) -> np.ndarray:
    """Observations until the alarm of ``num`` runs that start at 0; ``most`` for those that do not end before."""
    rng = rng_for(0, "robust", "delay", purpose)
    statistic, ticks = np.zeros(num), np.full(num, float(most))
    going = np.arange(num)
    for tick in range(1, most):
        statistic[going] = np.maximum(statistic[going] + values[rng.integers(len(values), size=len(going))], 0.0)
        ended = statistic[going] >= threshold
        ticks[going[ended]] = tick
        going = going[~ended]
        if not len(going):
            break
    return ticks


def family_claims(family: str, z: Increment, least: float, rows: Sequence[Row], pools: Pools, num: int) -> list[Claim]:
    """``least`` is the drift that the certificate of the design promises under every mixture of the three laws."""
    robust, *others = rows
    values = {law: z(x) for law, x in pools.items() if law != "null"}
    # Lorden's inequality (1970) bounds the mean overshoot by E max(z, 0)^2 / E z; the drift is the design's, not the one measured here
    bounds = {law: (robust.threshold + float((np.maximum(v, 0) ** 2).mean() / v.mean())) / least for law, v in values.items()}
    used = {law: robust.delay[law] / bounds[law] for law in bounds}
    law = max(used, key=lambda name: used[name])
    nearest = min(others, key=lambda row: row.worst)
    if not np.isfinite(nearest.worst):
        raise RuntimeError("no design for one law detects all three: there is nothing to compare the robust one with")
    slowest, rival = (max(row.delay, key=lambda name: row.delay[name]) for row in (robust, nearest))
    ratio = robust.worst / nearest.worst
    spread = ratio * sqrt((robust.error[slowest] / robust.worst) ** 2 + (nearest.error[rival] / nearest.worst) ** 2)
    blind = [row.name for row in others if row.worst == float("inf")]
    return [
        Claim(
            name=f"RBM, {family}: delay / its guarantee, the largest over laws",
            value=used[law],
            spread=robust.error[law] / bounds[law],
            bar=WITHIN,
            seeds=num,
            note=f"the guarantee is (threshold + overshoot) / certified drift {least:.3f}; least measured {min(robust.drift.values()):.3f}; largest under '{law}'",
        ),
        Claim(
            name=f"RBM, {family}: worst delay, robust / best design for one law",
            value=ratio,
            spread=spread,
            bar=WORST,
            seeds=num,
            note=f"measured ARL {ARL:,}; the next best is {nearest.name}; drift down, and never owe an alarm: {', '.join(blind) or 'none'}",
        ),
        slope_claim(f"RBM, {family}", values["small, one way"], num),
    ]


def slope_claim(name: str, values: np.ndarray, num: int) -> Claim:
    """Mean delay by threshold, a straight line in theory of slope ``1 / E z``."""
    means = [delays(values, b, 4 * num, f"slope {name} {b}").mean() for b in THRESHOLDS]
    slope = float(np.polyfit(THRESHOLDS, means, 1)[0] * values.mean())
    note = f"thresholds {THRESHOLDS[0]:g} to {THRESHOLDS[-1]:g}, {4 * num:,} runs each: slope {slope:.3f} of theory's"
    return Claim(
        name=f"{name}: slope of delay in the threshold, off theory's by",
        value=abs(slope - 1),
        spread=float("nan"),
        bar=SLOPE,
        seeds=4 * num,
        note=note,
    )


def gaussian_claims(num: int) -> list[Claim]:
    """Mean and variance uncertain on both sides: 200 laws drawn from the post-change box, against the promise."""
    pre, post = GaussianBox(mean=(-0.2, 0.2), variance=(0.8, 1.25)), GaussianBox(mean=(0.8, 3.0), variance=(0.8, 3.0))
    robust = RobustScoreCUSUM.fit(pre=pre, post=post, arl=ARL, clip=None)
    promise = robust.promise().delay
    rng = rng_for(0, "robust", "members")
    members = [Gaussian(m, v) for m, v in zip(rng.uniform(*post.mean, 200), rng.uniform(*post.variance, 200), strict=True)]
    exact = {law: exact_run_length(robust.increment, law, robust.threshold) for law in members}
    laws = sorted(exact, key=lambda law: -exact[law])[::30]
    runs = {law: simulated(robust, law, num, 100_000, f"robust gaussian {law}") for law in laws}
    highest = max((r.mean - exact[law]) / r.error for law, r in runs.items())
    law = Gaussian(0.8, 1.0)
    values = robust.increment(law.sample(rng_for(0, "robust", "gaussian slope"), POOL))
    print(
        f"Gaussian box: promised worst delay {promise:.2f}; simulated {', '.join(f'{r.mean:.1f} +- {r.error:.1f}' for r in runs.values())}\n",
        flush=True,
    )
    return [
        Claim(
            name="Gaussian box: exact delay / promised worst delay, the largest of 200 drawn from the box",
            value=max(exact.values()) / promise,
            spread=float("nan"),
            bar=WITHIN,
            seeds=1,
            note=f"{len(laws)} of them simulated, {num:,} runs each: at most {highest:+.1f} standard errors above the exact chain",
        ),
        slope_claim("Gaussian box", values, num),
    ]


def scan_claims(null: Law, changed: Law, num: int) -> list[Claim]:
    """SCUSUM with exact scores against Scan-B, which knows no law but 100 observations of the null, at measured run lengths."""
    z = ScoreCUSUM.fit(
        pre=Singleton(null), post=Singleton(changed), arl=ARL, clip=None, method="floor", rng=rng_for(0, "robust", "scan fit")
    ).increment
    pool = {name: z(law.sample(rng_for(0, "robust", "scan pool", name), POOL)) for name, law in (("null", null), ("changed", changed))}
    lengths, runs = in_control(pool["null"], num, "scan"), max(num // 10, 200)
    reference = null.sample(rng_for(0, "robust", "reference"), 100)
    scan = ScanB.fit(reference, threshold=1.0, rng=rng_for(0, "robust", "blocks"), block=20, blocks=5)
    rows, ratios = [], []
    for arl in SCAN_ARLS:
        ours = delays(pool["changed"], lengths.threshold(arl, certified=False), num, f"scan {arl}")
        tuned = calibrated(
            scan, null, arl=arl, rng=rng_for(0, "robust", "scan", arl), paths=400, horizon=max(2 * arl, 400), certified=False
        )
        theirs = simulated(tuned, changed, runs, 20_000, f"scan-b {arl}")
        ratios.append(float(ours.mean()) / theirs.mean)
        rows.append([f"{arl:,}", f"{ours.mean():.1f} +- {ours.std() / sqrt(num):.1f}", f"{theirs.mean:.1f} +- {theirs.error:.1f}"])
    print(f"SCUSUM with exact scores and Scan-B\n{aligned(['ARL', 'SCUSUM delay', 'Scan-B delay'], rows)}\n", flush=True)
    return [
        Claim(
            name="RBM: SCUSUM's delay / Scan-B's, the largest over ARL 200 to 2,000",
            value=max(ratios),
            spread=float("nan"),
            bar=BELOW,
            seeds=runs,
        )
    ]


def described(rows: Sequence[Row]) -> str:
    laws = list(rows[0].delay)
    lines = [[row.name, f"{row.threshold:.2f}", *(_shown(row, law) for law in laws)] for row in rows]
    return aligned(["design", "threshold", *laws], lines)


def _shown(row: Row, law: str) -> str:
    return f"never (drift {row.drift[law]:+.3f})" if np.isinf(row.delay[law]) else f"{row.delay[law]:.1f} +- {row.error[law]:.1f}"


@styled
def draw(rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Delay of each design under each true law; a cross at the top where it never owes an alarm."""
    drawn = figure(WIDE, 3.2)
    for axes, (family, designs) in zip(drawn.subplots(1, len(rows), sharey=True), rows.items(), strict=True):
        laws = list(designs[0].delay)
        top = 1.3 * max(d for row in designs for d in row.delay.values() if np.isfinite(d))
        for row, colour, marker, dashes in zip(designs, COLOURS, MARKERS * 2, DASHES * 2, strict=False):
            heights = [min(row.delay[law], top) for law in laws]
            axes.plot(laws, heights, color=colour, marker=marker, linestyle=dashes, label=row.name)
            never = [k for k, law in enumerate(laws) if np.isinf(row.delay[law])]
            axes.plot(never, [top] * len(never), "x", color=colour, markersize=9)
        axes.set(title=f"Boltzmann machines, {family}", yscale="log", ylabel="mean delay, observations")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(loc="upper right")
    save_figure(drawn, path)


if __name__ == "__main__":
    sys.exit(main("robust_detection", run))
