"""The in-control law of live streams: learned from the first updates of all, and again by those whose model was replaced.

Exports ``LearningPhase`` and its state, a value.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.glr import one_number
from detection.laws import Array
from detection.normal_scores import FittedScores, Mask, NormalScores, Prior, check_sign

_SCORES = ("location", "deviation", "counts", "down_weighted", "pool")


@dataclass(frozen=True, eq=False)
class LearningState:
    """``first`` (N, n) holds the ``n`` updates of the first phase so far, ``nan`` where a stream was not active, and nothing once
    ``scores`` are fitted to them. Of the ``relearning`` streams (K,), ascending, ``values`` (K, observations) hold the first ``filled`` (K,).
    """

    first: Array
    scores: FittedScores | None
    relearning: NDArray[np.int64]
    values: Array
    filled: NDArray[np.int64]

    @property
    def watched(self) -> Mask:
        """Streams (N,) whose law stands."""
        watched = np.full(len(self.first), self.scores is not None)
        watched[self.relearning] = False
        return watched


@dataclass(frozen=True, kw_only=True)
class LearningPhase:
    """``transform`` is fitted to the first ``calibration`` updates of the whole fleet, and refitted to ``relearning`` observations of a stream
    that :meth:`relearn` names: its location and scale, shrunk towards the fleet's; the pooled shape stays."""

    transform: NormalScores
    calibration: int
    relearning: int

    def __post_init__(self) -> None:
        if self.calibration < 2:
            raise ValueError(f"calibration must be a number of updates, 0 for none or at least 2, got {self.calibration!r}")
        if self.relearning < 2:
            raise ValueError(f"relearning must be at least 2 observations, got {self.relearning!r}")

    def init(self, streams: int) -> LearningState:
        """``streams`` streams of which nothing is known."""
        none = np.empty(0, np.int64)
        return LearningState(np.empty((streams, 0)), None, none, np.empty((0, self.relearning)), none)

    def step(self, state: LearningState, x: NDArray[Any], active: Mask) -> LearningState:
        """State after one observation ``x`` (N,) of each ``active`` stream, of which those that learn take theirs in.

        Raises ``ValueError`` for values that cannot be learned from, and at the end of the first phase as :meth:`NormalScores.fit` does.
        """
        if state.scores is not None and not state.relearning.size:
            return state
        learning = active & ~state.watched
        seen = np.where(learning, one_number(x), np.nan)
        _check_finite(seen, learning)
        check_sign(seen, self.transform.scale)
        return self._first(state, seen) if state.scores is None else self._again(state, seen, learning)

    def relearn(self, state: LearningState, mask: Mask) -> LearningState:
        """Forget the law of the streams in ``mask`` (N,); those that were learning again begin anew."""
        assert state.scores is not None
        kept = ~mask[state.relearning]
        relearning = np.concatenate((state.relearning[kept], np.flatnonzero(mask)))
        fresh = int(mask.sum())
        values = np.concatenate((state.values[kept], np.full((fresh, self.relearning), np.nan)))
        filled = np.concatenate((state.filled[kept], np.zeros(fresh, np.int64)))
        order = np.argsort(relearning)
        return replace(state, relearning=relearning[order], values=values[order], filled=filled[order])

    def arrays(self, state: LearningState) -> dict[str, NDArray[Any]]:
        """``state`` as named arrays."""
        arrays = {name: getattr(state, name) for name in ("first", "relearning", "values", "filled")}
        if state.scores is None:
            return arrays
        fitted = {name: getattr(state.scores, name) for name in _SCORES}
        return arrays | fitted | {"prior": np.array([*astuple(state.scores.prior), state.scores.floor])}

    def from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> LearningState:
        """The state that :meth:`arrays` described."""
        return LearningState(arrays["first"], self._scores(arrays), arrays["relearning"], arrays["values"], arrays["filled"])

    def _first(self, state: LearningState, seen: Array) -> LearningState:
        first = np.column_stack((state.first, seen))
        if first.shape[1] < self.calibration:
            return replace(state, first=first)
        return replace(state, first=first[:, :0], scores=self.transform.fit(first, ~np.isnan(first)))

    def _again(self, state: LearningState, seen: Array, learning: Mask) -> LearningState:
        takers = np.flatnonzero(learning[state.relearning])
        if not takers.size:
            return state
        values, filled = state.values.copy(), state.filled.copy()
        values[takers, filled[takers]] = seen[state.relearning[takers]]
        filled[takers] += 1
        state = replace(state, values=values, filled=filled)
        done = filled == self.relearning
        return self._settled(state, done) if done.any() else state

    def _settled(self, state: LearningState, done: Mask) -> LearningState:
        """With the law of those ``done`` (K,) refitted."""
        assert state.scores is not None
        rows = np.zeros(len(state.first), np.bool_)
        rows[state.relearning[done]] = True
        scores = state.scores.refit(rows, state.values[done])
        return replace(state, scores=scores, relearning=state.relearning[~done], values=state.values[~done], filled=state.filled[~done])

    def _scores(self, arrays: Mapping[str, NDArray[Any]]) -> FittedScores | None:
        if "prior" not in arrays:
            return None
        *prior, floor = arrays["prior"].tolist()
        return FittedScores(config=self.transform, prior=Prior(*prior), floor=floor, **{name: arrays[name] for name in _SCORES})


def _check_finite(seen: Array, learning: Mask) -> None:
    bad = learning & ~np.isfinite(seen)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} active streams have a nan or infinite value in the learning phase, the first is stream {int(bad.argmax())}; mark them inactive"
        )
