"""Dependence removed before a stream is watched: residuals of an AR(1) model, or means of blocks.

A lasting shift of ``delta`` deviations in a stream with correlation ``phi`` leaves ``delta sqrt((1 - phi) / (1 + phi))`` in its residuals:
dependent streams carry less evidence, whoever watches them. Standardise the residuals or means after, on calibration treated alike.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from detection.autocorrelation import Mask, checked, correlations, unbiased
from detection.detector import checked_mask, refused, shaped
from detection.laws import Array


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How an AR(1) term is removed from each stream; :meth:`fit` learns it. Coefficients end in ``[0, highest]``."""

    highest: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.highest < 1:
            raise ValueError(f"highest must lie between 0 and 1, both excluded, got {self.highest!r}")

    def fit(self, x: ArrayLike, observed: Mask | None = None) -> "FittedResidual":
        """From in-control streams ``x`` (N, n): each coefficient is freed of bias, shrunk to the fleet's as far as chance explains the
        difference, then clipped. Raises ``ValueError`` where no stream has 8 values that are not all equal."""
        x, observed = checked(x, observed)
        counts = observed.sum(axis=1)
        centre = np.where(observed, x, 0.0).sum(axis=1) / np.maximum(counts, 1)
        plain = correlations(x, 1, observed)[:, 0]
        known = ~np.isnan(plain) & (counts >= 8)
        if not known.any():
            raise ValueError("x must hold a stream of at least 8 observed values that are not all equal")
        own = unbiased(plain[known], counts[known])
        fleet = float(own.mean())
        noise = np.maximum(1.0 - fleet**2, 0.05) / counts[known]
        between = max(float(own.var(ddof=1) - noise.mean()), 0.0) if len(own) > 1 else np.inf
        phi = np.full(len(x), fleet)
        phi[known] = own if between == np.inf else fleet + between / (between + noise) * (own - fleet)
        return FittedResidual(phi=np.clip(phi, 0.0, self.highest), centre=centre)


@dataclass(frozen=True, eq=False)
class Past:
    """Each stream's last value ``last`` (N,) and how many ticks ``ago`` (N,) it was: ``inf`` before the first."""

    last: Array
    ago: Array

    def __len__(self) -> int:
        return len(self.last)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedResidual:
    """Coefficients ``phi`` (N,) and means ``centre`` (N,) of N streams.

    A residual is ``x`` minus its forecast, scaled to one variance, that of a forecast from the last tick: for a Gaussian AR(1) stream
    residuals are independent and alike, across gaps and from the first value on.
    """

    phi: Array
    centre: Array

    def init(self) -> Past:
        """Streams that have seen nothing."""
        return Past(np.zeros(len(self.phi)), np.full(len(self.phi), np.inf))

    def step(self, state: Past, x: ArrayLike, active: Mask | None = None) -> tuple[Past, Array]:
        """The state after one tick, and residuals (N,) of ``x`` (N,). A stream that is not ``active`` gives ``nan``; its clock runs on.

        Raises ``ValueError`` for values of active streams that are not finite.
        """
        values = shaped(x, len(state)).astype(np.float64, copy=False)
        active = np.ones(len(state), dtype=bool) if active is None else checked_mask(active, len(state), "active")
        filled = np.where(active, values, 0.0)
        if not np.isfinite(filled).all():
            raise refused(filled, takes_infinity=False)
        kept = self.phi**state.ago
        scale = np.sqrt((1.0 - self.phi**2) / (1.0 - kept**2))
        residuals = scale * (filled - self.centre - kept * (state.last - self.centre))
        after = Past(np.where(active, filled, state.last), np.where(active, 1.0, state.ago + 1.0))
        return after, np.where(active, residuals, np.nan)

    def transform(self, x: ArrayLike) -> Array:
        """Residuals (N, T) of whole streams ``x`` (N, T) from their start; ``nan`` is "not observed" in both."""
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 2 or len(x) != len(self.phi):
            raise ValueError(f"x must have {len(self.phi)} rows, one for each stream, got shape {x.shape}")
        state, residuals = self.init(), np.empty_like(x)
        for tick, column in enumerate(x.T):
            state, residuals[:, tick] = self.step(state, column, ~np.isnan(column))
        return residuals


@dataclass(frozen=True, eq=False)
class Block:
    """Sum ``total`` (N,) and number ``count`` (N,) of the values in each stream's unfinished block."""

    total: Array
    count: Array

    def __len__(self) -> int:
        return len(self.total)


@dataclass(frozen=True, kw_only=True)
class BatchMeans:
    """One mean in place of ``size`` values: no model of the dependence, at ``size - 1`` values of extra delay at most."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 value, got {self.size!r}")

    def init(self, streams: int) -> Block:
        """Streams that have seen nothing."""
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams!r}")
        return Block(np.zeros(streams), np.zeros(streams))

    def step(self, state: Block, x: ArrayLike, active: Mask | None = None) -> tuple[Block, Array, Mask]:
        """The state after one tick, the means (N,) and which of them are ready: give those alone to a detector, as its ``active`` streams."""
        values = shaped(x, len(state)).astype(np.float64, copy=False)
        active = np.ones(len(state), dtype=bool) if active is None else checked_mask(active, len(state), "active")
        total, count = state.total + np.where(active, values, 0.0), state.count + active
        if np.isnan(total).any() or (total == -np.inf).any():
            raise refused(np.where(active, values, 0.0), takes_infinity=True)
        ready = count == self.size
        return Block(np.where(ready, 0.0, total), np.where(ready, 0.0, count)), np.where(ready, total / self.size, 0.0), ready


def block_means(x: ArrayLike, size: int) -> Array:
    """Means (N, T // size) of consecutive blocks of ``x`` (N, T), over what was observed; ``nan`` for a block with less than half."""
    x = np.asarray(x, dtype=np.float64)
    blocks = x.shape[1] // size
    parts = x[:, : blocks * size].reshape(len(x), blocks, size)
    seen = ~np.isnan(parts)
    counts = seen.sum(axis=2)
    return np.where(2 * counts >= size, np.where(seen, parts, 0.0).sum(axis=2) / np.maximum(counts, 1), np.nan)
