"""Policies side by side in the same worlds: common random numbers, shared stages, paired differences.

For every seed the model is trained and pruned once and all policies meet the same streams, so a difference between two
policies is theirs alone. The seed is the unit of replication: clients of one run are not independent.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.driver import drive, given_or_ray
from fedsim.policies import Policy
from fedsim.randomness import rng_for
from fedsim.runs.run import Run, needing_matplotlib
from fedsim.runs.scores import Scores, accuracy_over_time
from fedsim.runs.text import aligned, number, share
from fedsim.runtime.executor import Executor
from fedsim.serving import Memo

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

RESAMPLES = 5_000


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(values: ArrayLike, *, resamples: int = RESAMPLES) -> Interval:
    """Mean of ``values`` (seeds,) and its 95 % percentile bootstrap interval over seeds; ``nan`` where a value is not finite.

    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    sample = np.asarray(values, np.float64)
    if not len(sample) or not np.isfinite(sample).all():
        return _UNDEFINED
    low, high = np.quantile(sample[_picks(len(sample), resamples)].mean(axis=1), [0.025, 0.975])
    return Interval(float(sample.mean()), float(low), float(high))


def bootstrap_ratio(numerators: ArrayLike, denominators: ArrayLike, *, resamples: int = RESAMPLES) -> Interval:
    """Ratio of the means of two (seeds,) arrays; the interval draws the seeds of both together.

    A seed whose own denominator is near 0 weighs little, where a mean of ratios would be ruled by it. ``nan`` where a value
    is not finite or the mean denominator is not above 0; the interval alone is ``nan`` where that happens in a resample.

    >>> bootstrap_ratio([1.0, 1.0], [4.0, 4.0])
    Interval(mean=0.25, low=0.25, high=0.25)
    """
    over, under = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not len(over) or not (np.isfinite(over) & np.isfinite(under)).all() or under.mean() <= 0:
        return _UNDEFINED
    ratio = float(over.mean() / under.mean())
    picks = _picks(len(over), resamples)
    tops, bottoms = over[picks].mean(axis=1), under[picks].mean(axis=1)
    if (bottoms <= 0).any():
        return Interval(ratio, float("nan"), float("nan"))
    low, high = np.quantile(tops / bottoms, [0.025, 0.975])
    return Interval(ratio, float(low), float(high))


_UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


def _picks(count: int, resamples: int) -> NDArray[np.int64]:
    return rng_for(0, "bootstrap", count).integers(count, size=(resamples, count))


@dataclass(frozen=True)
class PolicyComparison:
    """``runs[policy][i]`` is the stored run of that policy in the world of ``seeds[i]``; ``scores`` has its figures."""

    runs: Mapping[str, tuple[Run, ...]]
    scores: Mapping[str, tuple[Scores, ...]]
    seeds: tuple[int, ...]
    path: Path

    def values(self, policy: str, figure: str) -> NDArray[np.float64]:
        """One field of :class:`Scores` for each seed. ``ValueError`` for a policy or figure that is none."""
        if policy not in self.scores:
            raise ValueError(f"policy must be one of {sorted(self.scores)}, got {policy!r}")
        figures = [field.name for field in fields(Scores)]
        if figure not in figures:
            raise ValueError(f"figure must be one of {', '.join(figures)}; got {figure!r}")
        return np.array([float(getattr(s, figure)) for s in self.scores[policy]])

    def paired(self, first: str, second: str, figure: str = "accuracy_after") -> Interval:
        """``first`` minus ``second``, seed by seed."""
        return bootstrap(self.values(first, figure) - self.values(second, figure))

    def recovered(self, policy: str, *, best: str = "oracle", worst: str = "never", figure: str = "accuracy_after") -> Interval:
        """Mean gain of ``policy`` over ``worst`` as a share of the mean gain of ``best``: 0 is no better than ``worst``, 1 as good as ``best``.

        ``nan`` where ``best`` gains nothing over ``worst``, see :func:`bootstrap_ratio`. For a figure of which more is better.
        """
        floor = self.values(worst, figure)
        return bootstrap_ratio(self.values(policy, figure) - floor, self.values(best, figure) - floor)

    def table(self) -> str:
        """One row a policy: means over seeds, accuracies of the clients that change; "MB moved" by reactions, up and down.

        Where a figure is undefined in some seeds, the number of those it is the mean of is given.
        """
        rows = [[name, *(_mean([get(s) for s in scores], show) for _, get, show in _COLUMNS)] for name, scores in self.scores.items()]
        return aligned(["policy", *(title for title, _, _ in _COLUMNS)], rows)

    def differences(self, reference: str | None = None, figure: str = "accuracy_after") -> str:
        """Each policy minus ``reference`` (the first, by default), paired over seeds, with 95 % bootstrap intervals."""
        reference = reference or next(iter(self.scores))
        others = [name for name in self.scores if name != reference]
        return aligned([f"{figure}, minus {reference}", "mean [95 %]"], [[n, str(self.paired(n, reference, figure))] for n in others])

    def report(self, path: Path | None = None) -> Path:
        """Write a page with figures, ``comparison.html`` beside the runs by default; its path. Needs matplotlib."""
        with needing_matplotlib():
            from fedsim.runs.report import comparison_report
        accuracy = {name: self._accuracy(runs) for name, runs in self.runs.items()}
        details = {"Paired differences": self.differences()} if len(self.scores) > 1 else {}
        return comparison_report(self.scores, path or self.path / "comparison.html", accuracy=accuracy, details=details)

    def _accuracy(self, runs: tuple[Run, ...]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ticks (T,) and accuracies (seeds, T) of the clients that change."""
        lines = [accuracy_over_time(ticks=run.ticks(), truth=run.truth()) for run in runs]
        return lines[0][0], np.stack([line[1] for line in lines])


_COLUMNS: tuple[tuple[str, Callable[[Scores], float], Callable[[float], str]], ...] = (
    ("before", lambda s: s.accuracy_before, share),
    ("after", lambda s: s.accuracy_after, share),
    ("at the end", lambda s: s.accuracy_end, share),
    ("delay", lambda s: s.median_delay, number),
    ("false alarms", lambda s: s.false_alarms, number),
    ("misses", lambda s: s.misses, number),
    ("asked", lambda s: s.asked, number),
    ("refused", lambda s: s.rejected, number),
    ("MB moved", lambda s: s.megabytes_redeploy, number),
    ("worker s", lambda s: s.worker_seconds, number),
    ("harm", lambda s: s.harm, number),
)


def compare(
    simulation: "Simulation | Callable[[int], Simulation]",
    *,
    policies: Mapping[str, Policy],
    seeds: Iterable[int] = (0,),
    out: str | Path | None = None,
    executor: Executor | None = None,
    progress: bool = True,
    recipe: str | None = None,
) -> PolicyComparison:
    """Run ``simulation`` under every policy in the world of every seed, each as a stored run under ``out``.

    Without ``out`` the runs lie in a new directory among the system's temporary files: ``path`` of the comparison names it,
    and it stays until you or the system delete it. ``recipe`` is where ``simulation`` came from, stored for ``fedsim resume``.
    Fleet and task are those of ``simulation`` for every seed: intervals speak of training, streams and drift on that fleet and data.
    Pass a function of the seed that returns a simulation, and fleet, partition and data split are replicated as well.
    Training and submodels are computed once a seed, losses of a submodel on a stream once, whichever policies need them.
    Raises ``ValueError`` for no policy or no seed.
    """
    seeds = tuple(seeds)
    if not policies or not seeds:
        raise ValueError(f"compare needs at least one policy and one seed, got {list(policies)} and {list(seeds)}")
    place = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="fedsim-compare-"))
    runs: dict[str, list[Run]] = {name: [] for name in policies}
    with given_or_ray(executor) as workers:
        for seed in seeds:
            memo: Memo = {}
            world = simulation(seed) if callable(simulation) else simulation
            for name, policy in policies.items():
                one = replace(world, policy=policy, seed=seed, name=f"{world.name or 'compare'}-{name}-seed{seed}")
                runs[name].append(drive(one, place, executor=workers, progress=progress, recipe=recipe, memo=memo))
    scores = {name: tuple(run.scores() for run in found) for name, found in runs.items()}
    return PolicyComparison({name: tuple(found) for name, found in runs.items()}, scores, seeds, place)


def _mean(values: Sequence[float], show: Callable[[float], str]) -> str:
    defined = np.array([v for v in values if np.isfinite(v)])
    if not len(defined):
        return "–"
    mean = show(float(defined.mean()))
    return mean if len(defined) == len(values) else f"{mean} ({len(defined)} of {len(values)})"
