"""Clients that are too slow, or vanish while they train: deadlines with over-selection, dropout, and what their work had cost by then."""

# n clients drawn for a round

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.randomness import uniforms

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """The server draws ``over_select`` times the cohort, keeps the first to finish within ``seconds`` and sends the others home.

    With fewer than ``min_clients`` in time the round has failed: the model stays, the clock goes on. Infinite ``seconds``, which do not go with
    :class:`Dropout`, only send home those beyond the cohort.
    """

    seconds: float
    over_select: float = 1.3
    min_clients: int = 1

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        if not 1 <= self.over_select < float("inf"):
            raise ValueError(f"over_select must be at least 1 and finite, got {self.over_select}")
        if self.min_clients < 1:
            raise ValueError(f"min_clients must be at least 1, got {self.min_clients}")

    def drawn(self, cohort: int) -> int:
        """How many clients are drawn for a cohort of ``cohort``."""
        return math.ceil(self.over_select * cohort - 1e-9)

    def select(self, times: ArrayLike, wanted: int) -> tuple[NDArray[np.bool_], float]:
        """Who is kept (n,), of clients in ascending order that would take ``times`` (n,) seconds, and when the round ends.

        >>> kept, ended = Deadline(seconds=5).select([1.0, 10.0, 3.0, 2.0], wanted=3)
        >>> kept.tolist(), ended
        ([True, False, True, True], 3.0)
        """
        seconds = np.asarray(times, np.float64)
        order = np.argsort(seconds, kind="stable")[:wanted]
        kept = np.zeros(len(seconds), bool)
        kept[order[seconds[order] <= self.seconds]] = True
        everyone = kept.sum() == min(wanted, len(seconds))
        return kept, float(seconds[kept].max()) if everyone else self.seconds


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """In every round a client vanishes with ``probability``, at a local step drawn evenly; what it had uploaded by then stays."""

    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {self.probability}")

    def steps(self, seed: int, clients: NDArray[np.int64], round: int, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Local steps (n,) each client gets done of its ``steps`` (n,): all of them, or fewer where it vanishes."""
        draws = uniforms(seed, "dropout", clients, round, 2)
        return np.where(draws[:, 0] < self.probability, np.floor(draws[:, 1] * steps).astype(np.int64), steps)


class Shares(NamedTuple):
    """Shares (n,) of a download, of the local steps and of an upload that are done."""

    download: Floats
    compute: Floats
    upload: Floats


def done_by(seconds: float, download: Floats, compute: Floats, upload: Floats) -> Shares:
    """What clients that download, compute, then upload, in so many seconds (n,) each, have done after ``seconds``.

    >>> [share.tolist() for share in done_by(4.0, np.array([1.0]), np.array([2.0]), np.array([4.0]))]
    [[1.0], [1.0], [0.25]]
    """
    left = np.full(len(download), seconds)
    shares = []
    for part in (download, compute, upload):
        shares.append(np.clip(np.divide(left, part, out=np.ones(len(part)), where=part > 0), 0.0, 1.0))
        left = np.maximum(left - part, 0.0)
    return Shares(*shares)
