"""From loss streams to alarms: an in-control law per client, one robust detector for the fleet. The only importer of ``detection``."""

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection import DetectorState, FittedScores, NormalScores, ReflectedSum, RobustScoreCUSUM, confidence_box, default_post

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
POOLED = 0.9  # share of the fleet that must have been seen for a calibration before its common shape is fitted


@dataclass(frozen=True, eq=False)
class Taken:
    """The ``losses`` (n,) of one tick of ``clients`` (n,), ascending, whose in-control law is being learnt."""

    clients: NDArray[np.int32]
    losses: Floats

    def of(self, clients: Flags) -> "Taken":
        """Those of the flagged ``clients`` (C,) alone."""
        chosen = clients[self.clients]
        return self if chosen.all() else Taken(self.clients[chosen], self.losses[chosen])


@dataclass(frozen=True, eq=False)
class MonitorState:
    """``taken`` holds what clients have shown while their in-control law is being learnt, tick by tick, ``filled`` (C,) how many losses each.

    ``needed`` (C,) is how many it waits for, 0 once the law stands. ``seen`` (C,) counts all its active ticks, ``quiet_at`` (C,) is the
    last tick at which its statistic was 0, and ``tick`` the one that comes next.
    """

    tick: int

    taken: tuple[Taken, ...]
    filled: NDArray[np.int64]
    needed: NDArray[np.int64]
    seen: NDArray[np.int64]
    quiet_at: NDArray[np.int64]
    scores: FittedScores | None
    detector: DetectorState
    reference: Floats


@dataclass(frozen=True)
class Monitoring:
    """Watch every client's mean loss a tick with ``detector``, calibrated to a mean time between false alarms of ``arl`` ticks a client.

    Each client's in-control law is learnt from its first ``calibration`` ticks, pooled over the fleet by empirical Bayes, and
    after a redeployment from ``recalibration`` ticks. Losses become normal scores, clipped at ``clip``. The pre-change set
    covers the error of that calibration with probability ``confidence``, so the promise holds for the client at hand; the
    post-change set starts at ``shift``, the smallest mean shift in normal scores worth an alarm. arXiv:2407.11094.
    """

    detector: type[Any] = RobustScoreCUSUM
    _: KW_ONLY
    arl: float = 10_000
    calibration: int = 100
    recalibration: int = 30
    shift: float = 0.75
    clip: float = 4.0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not (isinstance(self.detector, type) and issubclass(self.detector, ReflectedSum) and hasattr(self.detector, "fit")):
            raise ValueError(f"detector must be a class of reflected sums with fit(), such as RobustScoreCUSUM, got {self.detector!r}")
        if not self.arl >= 2:
            raise ValueError(f"arl must be at least 2 ticks, got {self.arl}")
        if self.calibration < 10 or not 10 <= self.recalibration <= self.calibration:
            raise ValueError(
                f"calibration and recalibration must be at least 10 ticks, recalibration at most calibration, got {self.calibration} and {self.recalibration}"
            )
        if not 0 < self.confidence < 1 or not self.clip > 0 or not self.shift > 0:
            raise ValueError(f"need 0 < confidence < 1, clip > 0, shift > 0, got {self.confidence}, {self.clip}, {self.shift}")

    @cached_property
    def fitted(self) -> Any:
        """The detector on normal scores; raises ``ValueError`` where ``shift`` is too small to tell from the calibration error."""
        pre = confidence_box(self.recalibration, self.confidence)
        return self.detector.fit(pre=pre, post=default_post(pre, harm=self.shift, worst=self.clip), arl=self.arl, clip=self.clip)

    def init(self, num_clients: int) -> MonitorState:
        return MonitorState(
            tick=0,
            taken=(),
            filled=np.zeros(num_clients, np.int64),
            needed=np.full(num_clients, self.calibration),
            seen=np.zeros(num_clients, np.int64),
            quiet_at=np.full(num_clients, -1),
            scores=None,
            detector=self.fitted.init(num_clients),
            reference=np.full(num_clients, np.nan),
        )

    def step(self, state: MonitorState, losses: Floats, active: Flags) -> tuple[MonitorState, Flags]:
        """Take in the fleet's losses (C,) of one tick; alarms (C,) among the ``active`` clients whose law stands.

        An infinite loss is an alarm whether it stands or not, and is never learnt. Raises ``ValueError`` for ``nan``, naming the client.
        """
        if np.isnan(losses[active]).any():
            raise ValueError(f"the loss of client {int(np.flatnonzero(active & np.isnan(losses))[0])} at tick {state.tick} is nan")
        watched = active & self.watched(state)
        detector = state.detector
        if state.scores is not None and watched.any():
            signal = np.where(watched, state.scores.transform(np.where(watched, losses, 1.0)), 0.0)
            detector = self.fitted.step(detector, signal, watched)
        alarms = np.asarray(self.fitted.alarms(detector)) & watched
        quiet_at = np.where(watched & (detector.statistic > 0), state.quiet_at, state.tick)
        state = replace(
            state, tick=state.tick + 1, detector=detector, seen=state.seen + active, quiet_at=np.where(active, quiet_at, state.quiet_at)
        )
        broken = active & np.isposinf(losses)
        return self._learn(state, losses, active & ~broken & (state.filled < state.needed)), alarms | broken

    def watched(self, state: MonitorState) -> Flags:
        """Clients (C,) whose in-control law stands, so that they can alarm."""
        return np.asarray(state.needed == 0)

    def relearn(self, state: MonitorState, clients: Flags) -> MonitorState:
        """Forget the in-control law of ``clients`` (C,), whose submodel changed, and learn it anew."""
        return replace(
            state,
            taken=_without(state.taken, clients),
            filled=np.where(clients, 0, state.filled),
            needed=np.where(clients, self.recalibration, state.needed),
            quiet_at=np.where(clients, state.tick, state.quiet_at),
            detector=self.fitted.restart(state.detector, clients),
        )

    def restart(self, state: MonitorState, clients: Flags) -> MonitorState:
        """Set the statistic of ``clients`` (C,) back to 0; their law stays."""
        quiet_at = np.where(clients, state.tick - 1, state.quiet_at)
        return replace(state, detector=self.fitted.restart(state.detector, clients), quiet_at=quiet_at)

    def changed_at(self, state: MonitorState) -> NDArray[np.int64]:
        """Estimated first changed tick of each client (C,): one after the last tick at which its statistic was 0."""
        return state.quiet_at + 1

    def _learn(self, state: MonitorState, losses: Floats, learning: Flags) -> MonitorState:
        if learning.any():
            rows = np.flatnonzero(learning).astype(np.int32)
            if state.taken and np.array_equal(rows, state.taken[-1].clients):
                rows = state.taken[-1].clients  # held once while the same clients learn
            state = replace(state, taken=(*state.taken, Taken(rows, losses[rows])), filled=state.filled + learning)
        done = (state.needed > 0) & (state.filled >= state.needed)
        return self._settle(state, done) if done.any() else state

    def _settle(self, state: MonitorState, done: Flags) -> MonitorState:
        """Give the clients of ``done`` (C,) their in-control law; the first time, together with the fleet's pooled shape."""
        if state.scores is not None:
            losses, there = self._shown(state, done)
            width = int(state.filled[done].max())
            scores = state.scores.refit(done, losses[:, :width], there[:, :width])
        elif (state.seen >= self.calibration).mean() >= POOLED:
            losses, there = self._shown(state, np.ones(len(done), bool))
            scores = NormalScores(clip=self.clip).fit(losses, there)
            losses = losses[done]
        else:
            return state
        reference = state.reference.copy()
        reference[done] = losses.sum(axis=1) / np.maximum(state.filled[done], 1)
        return replace(state, scores=scores, taken=_without(state.taken, done), needed=np.where(done, 0, state.needed), reference=reference)

    def _shown(self, state: MonitorState, clients: Flags) -> tuple[Floats, Flags]:
        """The losses (n, calibration) of ``clients`` (C,) so far, in order of time, 0 where there is none yet; and where there is one."""
        row = np.cumsum(clients) - 1
        losses = np.zeros((int(clients.sum()), self.calibration))
        filled = np.zeros(len(losses), np.int64)
        for taken in state.taken:
            some = taken.of(clients)
            rows = row[some.clients]
            losses[rows, filled[rows]] = some.losses
            filled[rows] += 1
        return losses, np.arange(self.calibration) < filled[:, None]


def _without(log: tuple[Taken, ...], clients: Flags) -> tuple[Taken, ...]:
    """``log`` without what ``clients`` (C,) have shown."""
    left = (taken.of(~clients) for taken in log)
    return tuple(taken for taken in left if len(taken.clients))
