"""Policies side by side in the same worlds: common random numbers, shared stages, paired differences.

For every seed the model is trained and pruned once and all policies meet the same streams, so a difference between two
policies is theirs alone. The seed is the unit of replication: clients of one run are not independent.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.driver import drive, given_or_ray
from fedsim.policies import Policy
from fedsim.randomness import rng_for
from fedsim.runs.run import Run
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
    """Mean of ``values`` (seeds,) and its 95 % percentile bootstrap interval over seeds; ``nan`` where a value is.

    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    sample = np.asarray(values, np.float64)
    if not len(sample) or np.isnan(sample).any():
        return Interval(float("nan"), float("nan"), float("nan"))
    picks = rng_for(0, "bootstrap", len(sample)).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(sample.mean()), float(low), float(high))


@dataclass(frozen=True)
class PolicyComparison:
    """``runs[policy][i]`` is the stored run of that policy in the world of ``seeds[i]``; ``scores`` has its figures."""

    runs: Mapping[str, tuple[Run, ...]]
    scores: Mapping[str, tuple[Scores, ...]]
    seeds: tuple[int, ...]
    path: Path

    def values(self, policy: str, figure: str) -> NDArray[np.float64]:
        """One field of :class:`Scores` for each seed."""
        if policy not in self.scores:
            raise ValueError(f"policy must be one of {sorted(self.scores)}, got {policy!r}")
        return np.array([float(getattr(s, figure)) for s in self.scores[policy]])

    def paired(self, first: str, second: str, figure: str = "accuracy_after") -> Interval:
        """``first`` minus ``second``, seed by seed."""
        return bootstrap(self.values(first, figure) - self.values(second, figure))

    def recovered(self, policy: str, *, best: str = "oracle", worst: str = "never", figure: str = "accuracy_after") -> Interval:
        """What ``policy`` recovers of what ``best`` recovers over ``worst``, seed by seed: 0 is no better than ``worst``, 1 as good as ``best``."""
        floor = self.values(worst, figure)
        return bootstrap((self.values(policy, figure) - floor) / (self.values(best, figure) - floor))

    def table(self) -> str:
        """One row a policy: means over seeds, accuracies of the clients that change."""
        rows = [[name, *(_mean([get(s) for s in scores], show) for _, get, show in _COLUMNS)] for name, scores in self.scores.items()]
        return aligned(["policy", *(title for title, _, _ in _COLUMNS)], rows)

    def differences(self, reference: str | None = None, figure: str = "accuracy_after") -> str:
        """Each policy minus ``reference`` (the first, by default), paired over seeds, with 95 % bootstrap intervals."""
        reference = reference or next(iter(self.scores))
        others = [name for name in self.scores if name != reference]
        return aligned([f"{figure}, minus {reference}", "mean [95 %]"], [[n, str(self.paired(n, reference, figure))] for n in others])

    def report(self, path: Path | None = None) -> Path:
        """Write a page with figures, ``comparison.html`` beside the runs by default; its path. Needs matplotlib."""
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
    ("MB sent", lambda s: s.bytes_redeploy / 1e6, number),
    ("worker s", lambda s: s.worker_seconds, number),
    ("harm", lambda s: s.harm, number),
)


def compare(
    simulation: "Simulation",
    *,
    policies: Mapping[str, Policy],
    seeds: Iterable[int] = (0,),
    out: str | Path | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> PolicyComparison:
    """Run ``simulation`` under every policy in the world of every seed, each as a stored run under ``out`` (default: a temporary directory).

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
            for name, policy in policies.items():
                one = replace(simulation, policy=policy, seed=seed, name=f"{simulation.name or 'compare'}-{name}-seed{seed}")
                runs[name].append(drive(one, place, executor=workers, progress=progress, memo=memo))
    scores = {name: tuple(run.scores() for run in found) for name, found in runs.items()}
    return PolicyComparison({name: tuple(found) for name, found in runs.items()}, scores, seeds, place)


def _mean(values: Sequence[float], show: Callable[[float], str]) -> str:
    defined = np.array([v for v in values if np.isfinite(v)])
    return show(float(defined.mean())) if len(defined) else "–"
