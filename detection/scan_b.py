"""Scan-B: the newest block of observations against reference blocks by a kernel two-sample statistic; no laws, no scores.

Li, Xie, Dai and Song (2015, 2019), "Scan B-statistic for kernel change-point detection", arXiv:1507.01279.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.detector import Detector, Ticks
from detection.laws import Array

# N streams, M reference blocks, B observations a block, d numbers an observation
_POINTS = 1000  # reference points that decide the bandwidth and the variance


@dataclass(frozen=True, eq=False)
class ScanState:
    """``N`` streams: the last ``B`` observations ``window`` (N, B, d), observation ``t`` in slot ``t mod B``; what each slot adds to the
    kernel sums across (``across`` (N, B)) and among observations older than it (``among`` (N, B)); the ``statistic`` and ``clock`` (N,)."""

    window: Array
    across: Array
    among: Array
    statistic: Array
    clock: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanB(Detector[ScanState]):
    """Mean over reference blocks of the unbiased squared maximum mean discrepancy (MMD) to the newest block, over its in-control deviation.

    ``reference`` is (M, B, d), the kernel is Gaussian with ``bandwidth``, ``deviation`` the standard deviation of the mean discrepancy. The
    statistic is 0 until ``B`` observations are there. Reference blocks stay as drawn (the paper moves them along), so given them the mean
    of the statistic is not exactly 0: calibrate the threshold against the detector as built. Observations are (N,) for ``d = 1``.
    """

    reference: Array
    bandwidth: float
    deviation: float

    def __post_init__(self) -> None:
        super().__post_init__()
        reference = np.array(self.reference, dtype=np.float64)
        if reference.ndim != 3 or reference.shape[1] < 2 or reference.size == 0 or not np.isfinite(reference).all():
            raise ValueError(f"reference must be finite, of shape (blocks, observations >= 2, dimension), got shape {reference.shape}")
        object.__setattr__(self, "reference", reference)
        for name, value in (("bandwidth", self.bandwidth), ("deviation", self.deviation)):
            if not 0 < value < np.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}")

    @classmethod
    def fit(cls, reference: ArrayLike, *, threshold: float, rng: np.random.Generator, block: int = 20, blocks: int = 5) -> Self:
        """Blocks drawn without replacement from in-control observations (n,) or (n, d); bandwidth by the median heuristic.

        Raises ``ValueError`` for fewer than ``block * blocks`` observations, for ``nan`` and infinite ones, and for a constant reference.
        """
        pool = np.asarray(reference, dtype=np.float64)
        pool = pool[:, None] if pool.ndim == 1 else pool
        if pool.ndim != 2 or not np.isfinite(pool).all():
            raise ValueError(f"reference must hold finite observations (n,) or (n, d), got shape {np.shape(reference)}")
        if block < 2 or blocks < 1 or len(pool) < max(block * blocks, 4):
            raise ValueError(
                f"reference must hold at least block * blocks observations, with block >= 2 and blocks >= 1; got {len(pool)} for block={block}, blocks={blocks}"
            )
        pool = pool[rng.permutation(len(pool))]
        bandwidth, spread = _bandwidth_and_spread(pool[:_POINTS])
        variance = 2.0 * spread * (blocks + 3) / (blocks * block * (block - 1))
        drawn = pool[: block * blocks].reshape(blocks, block, -1)
        return cls(reference=drawn, bandwidth=bandwidth, deviation=float(np.sqrt(variance)), threshold=threshold)

    def statistic(self, state: ScanState) -> Array:
        """Standardised mean discrepancy (N,); may be negative."""
        return state.statistic

    def changed_at(self, state: ScanState) -> Ticks:
        """The first observation of the newest block: as coarse as the block is long."""
        return np.asarray(np.maximum(state.clock - self.reference.shape[1] + 1, 1))

    @cached_property
    def _within(self) -> float:
        """Mean over blocks of the kernel sum over ordered pairs of different reference observations."""
        kernel = self._kernel(self.reference[:, :, None, :], self.reference[:, None, :, :])
        return float(kernel.sum() / len(kernel) - self.reference.shape[1])

    def _fresh(self, streams: int) -> ScanState:
        _, size, dimension = self.reference.shape
        shape = (streams, size)
        none = np.zeros(streams, np.int64)
        return ScanState(np.zeros((*shape, dimension)), np.zeros(shape), np.zeros(shape), np.zeros(streams), none)

    def _next(self, state: ScanState, x: Array) -> ScanState:
        blocks, size, dimension = self.reference.shape
        x = x[:, None] if x.ndim == 1 else x
        if x.shape[1] != dimension:
            raise ValueError(f"observations must have {dimension} numbers, as the reference has, got {x.shape[1]}")
        streams, slot = np.arange(len(x)), state.clock % size
        window, across = state.window.copy(), state.across.copy()
        present = np.arange(size) < state.clock[:, None]
        # the oldest observation leaves: younger ones lose their pair with it
        left = self._kernel(state.window[streams, slot][:, None], state.window) * present
        among = np.where(state.clock[:, None] >= size, state.among - left, state.among)
        present[streams, slot] = False
        among[streams, slot] = (self._kernel(x[:, None], state.window) * present).sum(axis=1)
        window[streams, slot] = x
        kernel = self._kernel(x[:, None], self.reference.reshape(1, blocks * size, dimension)).reshape(len(x), blocks, size)
        across[streams, slot] = (kernel.sum(axis=2) - kernel[streams, :, slot]).sum(axis=1) / blocks
        discrepancy = self._within + 2.0 * among.sum(axis=1) - 2.0 * across.sum(axis=1)
        standard = discrepancy / (size * (size - 1) * self.deviation)
        clock = state.clock + 1
        return ScanState(window, across, among, np.where(clock >= size, standard, 0.0), clock)

    def _kernel(self, x: Array, y: Array) -> Array:
        """Gaussian kernel over the last axis. Dimensions are added in order, so a stream's bits do not depend on its neighbours."""
        square = np.zeros(np.broadcast_shapes(x.shape, y.shape)[:-1])
        for part in range(x.shape[-1]):
            square += (x[..., part] - y[..., part]) ** 2
        return np.asarray(np.exp(square / (-2.0 * self.bandwidth**2)))


def _bandwidth_and_spread(points: Array) -> tuple[float, float]:
    """Median distance between ``points`` (n, d), and the mean square of the doubly centred kernel, without bias (U-centring).

    With ``c`` that mean square, the four-point kernel ``h`` has ``E h^2 = 4 c``, and two of them that share a pair have covariance ``c``:
    the variance formula of the paper, ``(E h^2 + (M - 1) Cov) / M`` over the number of pairs, is ``(M + 3) c / M`` over it.
    """
    square = sum((np.subtract.outer(column, column) ** 2 for column in points.T), np.zeros((len(points), len(points))))
    off = ~np.eye(len(points), dtype=bool)
    bandwidth = float(np.sqrt(np.median(square[off])))
    if bandwidth == 0:
        raise ValueError("most of the reference observations are equal: the median distance, the kernel's bandwidth, is 0")
    n = len(points)
    kernel = np.where(off, np.exp(square / (-2.0 * bandwidth**2)), 0.0)
    rows = kernel.sum(axis=1) / (n - 2)
    centred = np.where(off, kernel - rows[:, None] - rows[None, :] + kernel.sum() / ((n - 1) * (n - 2)), 0.0)
    return bandwidth, float((centred**2).sum() / (n * (n - 3)))
