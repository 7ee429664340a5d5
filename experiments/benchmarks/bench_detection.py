"""How long a tick of a fleet takes: a million streams, against plain NumPy; ten thousand, against river's detectors; an exact threshold.

All on one core, in seconds this thread computes; what is compared is timed in turn, so that a busy machine slows both alike.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from detection import (
    Gaussian,
    Increment,
    NormalScores,
    ReflectedSum,
    RobustScoreCUSUM,
    Standardised,
    confidence_box,
    default_post,
    exact_threshold,
    likelihood_increment,
)
from detection.states import columns
from detection.tabled_scores import TabledScores
from experiments.study import Claim, Skipped, main
from fedsim.randomness import rng_for
from fedsim.runs.text import aligned

TICK, PLAIN, ADWIN, PAGE_HINKLEY, EXACT = "< 12 ms", "<= 3 x", ">= 15 x", ">= 60 x", "< 50 ms"
MILLION, FEW, CALIBRATION = 1_000_000, 10_000, 30


@dataclass(frozen=True, kw_only=True, eq=False)
class OnLosses(ReflectedSum):
    """A detector of raw signals: each stream is standardised, or scored, by its own law on the way."""

    z: Increment

    def _increment(self) -> Increment:
        return self.z


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls."""

    seconds: tuple[float, ...]

    @property
    def middle(self) -> float:
        return median(self.seconds)

    def __str__(self) -> str:
        low, _, high = quantiles(self.seconds, n=4)
        return f"{1e3 * self.middle:.2f} ms [{1e3 * low:.2f}, {1e3 * high:.2f}]"


def run(quick: bool, out: Path) -> list[Claim]:
    """15 repetitions with ``quick``, else 101."""
    repeats = 15 if quick else 101
    return [*million_streams(repeats), threshold(repeats), *against_river(repeats)]


def million_streams(repeats: int) -> list[Claim]:
    """One tick of a million float64 streams, every step a new state."""
    rng = rng_for(0, "benchmark", "million")
    design = fleet_design()
    losses = rng.lognormal(-1.0, 0.8, MILLION)
    scores = NormalScores(min_calibration=CALIBRATION).fit(rng.lognormal(-1.0, 0.8, (20_000, CALIBRATION)))
    tabled = TabledScores.of(_spread(scores, MILLION))
    raw = OnLosses(
        threshold=design.threshold,
        clip=design.clip,
        z=Standardised.of(design.increment, rng.standard_normal(MILLION), rng.uniform(0.5, 2.0, MILLION)),
    )
    scored = OnLosses(threshold=design.threshold, clip=design.clip, z=tabled.increment(design.increment))
    z, statistic = rng.standard_normal(MILLION), np.abs(rng.standard_normal(MILLION))
    room, state, spare = np.empty(MILLION), design.init(MILLION), design.init(MILLION)
    found = in_turn(
        {
            "plain: np.maximum(statistic + z, 0)": lambda: np.maximum(statistic + z, 0.0),
            "plain, in place": lambda: np.maximum(np.add(statistic, z, out=room), 0.0, out=room),
            "standardise + step": lambda: raw.step(state, losses),
            "standardise + step, into a spare state": lambda: raw.step(state, losses, out=spare),
            "normal scores of losses": lambda: tabled.transform(losses, out=room),
            "normal scores, then step": lambda: design.step(state, tabled.transform(losses)),
            "normal scores and step in one": lambda: scored.step(state, losses),
            "normal scores and step in one, into a spare state": lambda: scored.step(state, losses, out=spare),
        },
        repeats,
    )
    plain = found["plain: np.maximum(statistic + z, 0)"].middle
    bytes_each = sum(column.itemsize for _, column in columns(state))
    rows = [[name, str(t), f"{t.middle / plain:.2f}"] for name, t in found.items()]
    print(f"One tick of {MILLION:,} float64 streams, one core; a state takes {bytes_each} bytes a stream")
    print(f"{aligned(['what', 'median [quartiles]', 'x plain'], rows)}\n", flush=True)
    return [
        _within("a tick of 1e6 streams, standardised by location and deviation", found["standardise + step"], TICK, 1e3),
        _within("a tick of 1e6 streams, losses to normal scores by table", found["normal scores and step in one"], TICK, 1e3),
        _within("a standardised tick / NumPy's np.maximum(statistic + z, 0)", found["standardise + step"], PLAIN, 1 / plain),
    ]


def threshold(repeats: int) -> Claim:
    """Of Gaussian CUSUM for a shift of 1 at ARL 10,000."""
    null = Gaussian(0.0, 1.0)
    z = likelihood_increment(null, Gaussian(1.0, 1.0))
    found = in_turn({"exact threshold at ARL 10,000": partial(exact_threshold, z, (null,), 10_000.0)}, repeats)
    timing = found["exact threshold at ARL 10,000"]
    print(f"Exact threshold, one law, ARL 10,000: {timing}\n", flush=True)
    return _within("an exact threshold at ARL 10,000", timing, EXACT, 1e3)


def against_river(repeats: int) -> list[Claim]:
    """Nanoseconds a stream and tick of 10,000 streams, river's objects one stream after the other, both on the same numbers."""
    try:
        from river.drift import ADWIN as RiverADWIN  # noqa: N811 - an acronym
        from river.drift import PageHinkley
    except ImportError as error:
        raise Skipped("river is not installed: pip install 'fedsim[streams]'") from error
    design, ticks = fleet_design(), 20
    x = rng_for(0, "benchmark", "river").standard_normal((ticks, FEW))

    def ours() -> None:
        state = design.init(FEW)
        for row in x:
            state = design.step(state, row)

    def theirs(kind: Callable[[], Any], streams: int) -> None:
        detector = kind()  # one on a long stream costs less than one a stream, and it grows no longer state than ours
        for value in x[:, :streams].ravel().tolist():
            detector.update(value)

    few = 1_000  # river's time is proportional to streams
    found = in_turn(
        {"ours": ours, "ADWIN": lambda: theirs(RiverADWIN, few), "PageHinkley": lambda: theirs(PageHinkley, few)}, min(repeats, 15)
    )
    each = {name: 1e9 * t.middle / (ticks * (FEW if name == "ours" else few)) for name, t in found.items()}
    print("ns a stream and tick: " + ", ".join(f"{name} {value:.1f}" for name, value in each.items()) + "\n", flush=True)
    bars = {"ADWIN": ADWIN, "PageHinkley": PAGE_HINKLEY}
    return [
        Claim(
            name=f"a step of ours at 1e4 streams, times faster than river's {name}",
            value=each[name] / each["ours"],
            spread=float("nan"),
            bar=bar,
            seeds=1,
            note=f"{each['ours']:.1f} ns against {each[name]:.0f} ns a stream and tick, medians",
        )
        for name, bar in bars.items()
    ]


def fleet_design() -> RobustScoreCUSUM:
    """What a fleet monitors with by default."""
    pre = confidence_box(n=CALIBRATION)
    return RobustScoreCUSUM.fit(pre=pre, post=default_post(pre))


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Each call ``repeats`` times after a warm-up, one after the other in every repetition."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if repeat:
                seconds[name].append(time.thread_time() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _within(name: str, timing: Timing, bar: str, scale: float) -> Claim:
    low, _, high = quantiles(timing.seconds, n=4)
    note = f"median of {len(timing.seconds)}, quartiles {scale * low:.2f} and {scale * high:.2f}"
    return Claim(name=name, value=scale * timing.middle, spread=float("nan"), bar=bar, seeds=1, note=note)


def _spread(scores: Any, streams: int) -> Any:
    """The fitted law of ``streams`` clients, those of ``scores`` over and over."""
    from dataclasses import replace

    pick = np.resize(np.arange(len(scores.location)), streams)
    shared: Sequence[str] = ("location", "deviation", "counts", "down_weighted")
    return replace(scores, **{name: getattr(scores, name)[pick] for name in shared})


if __name__ == "__main__":
    sys.exit(main("bench_detection", run))
