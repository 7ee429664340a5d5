"""Streams that know where they change, for tests and studies: a kind of drift times a kind of values.

A drift is a ``share`` (N, T) between 0, in control, and 1, fully changed: ``abrupt``, ``gradual`` or ``recurring``. The other functions draw values
whose law moves with it: ``gaussian``, ``student``, ``autoregressive``, and the losses ``gamma_losses``, ``lognormal_losses``, ``easy_hard_losses``.

>>> streams = gaussian(abrupt(3, 200, nu=101), np.random.default_rng(0), mean=2.0)
>>> streams.values.shape, streams.nu
((3, 200), array([101., 101., 101.]))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from detection.laws import Array


@dataclass(frozen=True, eq=False)
class ChangingStreams:
    """``values`` (N, T) or (N, T, d) of ``N`` streams, whose law at each tick is changed by ``share`` (N, T), 0 for in control."""

    values: Array
    share: Array

    def __post_init__(self) -> None:
        _check_share(self.share)
        if self.values.shape[:2] != self.share.shape:
            raise ValueError(f"values must be (N, T) or (N, T, d) with share {self.share.shape}, got shape {self.values.shape}")

    @property
    def nu(self) -> Array:
        """First changed observation of each stream (N,), counted from 1; ``nan`` where there is none."""
        changed = self.share > 0
        return np.where(changed.any(axis=1), changed.argmax(axis=1) + 1.0, np.nan)


def abrupt(streams: int, ticks: int, nu: ArrayLike) -> Array:
    """Share (N, T) of a change that is complete from observation ``nu`` on, a number or (N,), counted from 1; ``nan``: never.

    >>> abrupt(1, 5, nu=3)
    array([[0., 0., 1., 1., 1.]])
    """
    return gradual(streams, ticks, nu, length=1)


def gradual(streams: int, ticks: int, nu: ArrayLike, length: int) -> Array:
    """Share (N, T) that grows evenly from ``1 / length`` at ``nu`` to 1 at observation ``nu + length - 1``.

    >>> gradual(1, 5, nu=2, length=2)
    array([[0. , 0.5, 1. , 1. , 1. ]])
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 tick, got {length!r}")
    since = _since(streams, ticks, nu)
    return np.asarray(np.clip((since + 1) / length, 0.0, 1.0))


def recurring(streams: int, ticks: int, nu: ArrayLike, period: int) -> Array:
    """Share (N, T) of a change that comes at ``nu``, goes after ``period`` observations, and so on.

    >>> recurring(1, 7, nu=2, period=2)
    array([[0., 1., 1., 0., 0., 1., 1.]])
    """
    if period < 1:
        raise ValueError(f"period must be at least 1 tick, got {period!r}")
    since = np.maximum(_since(streams, ticks, nu), -1.0)
    return np.where((since >= 0) & (since // period % 2 == 0), 1.0, 0.0)


def gaussian(
    share: Array, rng: np.random.Generator, *, mean: float | Sequence[float] = 1.0, variance: float | Sequence[float] = 1.0
) -> ChangingStreams:
    """``N(0, 1)``, and ``N(mean, variance)`` after the change; (d,) for independent coordinates, then values are (N, T, d)."""
    shift, scale = np.broadcast_arrays(np.asarray(mean, dtype=np.float64), np.asarray(variance, dtype=np.float64))
    if shift.ndim > 1 or not (scale > 0).all():
        raise ValueError(f"mean and variance must be numbers or (d,), variances positive, got {mean!r} and {variance!r}")
    _check_share(share)
    grown = share.reshape(share.shape + (1,) * shift.ndim)
    noise = rng.standard_normal(share.shape + shift.shape)
    return ChangingStreams(grown * shift + np.sqrt(1 + grown * (scale - 1)) * noise, share)


def student(share: Array, rng: np.random.Generator, *, degrees: float = 3.0, mean: float = 1.0) -> ChangingStreams:
    """Heavy tails: Student's t with ``degrees`` of freedom (variance ``degrees / (degrees - 2)`` above 2), moved by ``mean``."""
    _positive(degrees=degrees)
    _check_share(share)
    return ChangingStreams(share * mean + rng.standard_t(degrees, share.shape), share)


def autoregressive(share: Array, rng: np.random.Generator, *, phi: float = 0.5, mean: float = 1.0) -> ChangingStreams:
    """``mean * share`` plus a stationary AR(1) of variance 1: each noise is ``phi`` of the one before and something new."""
    if not -1 < phi < 1:
        raise ValueError(f"phi must lie in (-1, 1), got {phi!r}")
    _check_share(share)
    noise = rng.standard_normal(share.shape)
    noise[:, 1:] *= np.sqrt(1 - phi * phi)
    for tick in range(1, share.shape[1]):
        noise[:, tick] += phi * noise[:, tick - 1]
    return ChangingStreams(share * mean + noise, share)


def gamma_losses(
    share: Array, rng: np.random.Generator, *, factor: float = 2.0, spread: float = 1.0, shape: float = 0.7
) -> ChangingStreams:
    """Losses ``Gamma(shape, 1)`` times a scale of each stream's own, ``exp(N(0, spread^2))``, and times ``factor`` after the change."""
    _positive(shape=shape)
    return _losses(share, rng, factor, spread, rng.gamma(shape, 1.0, share.shape))


def lognormal_losses(
    share: Array, rng: np.random.Generator, *, factor: float = 2.0, spread: float = 1.0, deviation: float = 1.0
) -> ChangingStreams:
    """Losses ``exp(N(0, deviation^2))``; scales and change as in :func:`gamma_losses`."""
    _positive(deviation=deviation)
    return _losses(share, rng, factor, spread, rng.lognormal(0.0, deviation, share.shape))


def easy_hard_losses(
    share: Array, rng: np.random.Generator, *, factor: float = 2.0, spread: float = 1.0, hard: float = 0.15
) -> ChangingStreams:
    """Losses of examples most of which are easy, ``Gamma(1.5, 0.1)``, and a part ``hard``, ``Gamma(4, 0.6)``; the rest as in :func:`gamma_losses`."""
    if not 0 <= hard <= 1:
        raise ValueError(f"hard must lie in [0, 1], got {hard!r}")
    is_hard = rng.random(share.shape) < hard
    losses = np.where(is_hard, rng.gamma(4.0, 0.6, share.shape), rng.gamma(1.5, 0.1, share.shape))
    return _losses(share, rng, factor, spread, losses)


def _losses(share: Array, rng: np.random.Generator, factor: float, spread: float, losses: Array) -> ChangingStreams:
    _positive(factor=factor)
    if spread < 0:
        raise ValueError(f"spread must be 0 or more, got {spread!r}")
    _check_share(share)
    scale = rng.lognormal(0.0, spread, (len(share), 1))
    return ChangingStreams(scale * (1 + share * (factor - 1)) * losses, share)


def _since(streams: int, ticks: int, nu: ArrayLike) -> Array:
    """Observations since ``nu`` (N, T), 0 at ``nu``, negative before it and -inf without one."""
    if streams < 1 or ticks < 1:
        raise ValueError(f"streams and ticks must be at least 1, got {streams!r} and {ticks!r}")
    first = np.asarray(nu, dtype=np.float64)
    if first.shape not in {(), (streams,)} or (first < 1).any() or (first % 1 > 0).any():
        raise ValueError(f"nu must be whole numbers of 1 or more, or nan, one or one for each of {streams} streams, got {nu!r}")
    first = np.broadcast_to(np.where(np.isnan(first), np.inf, first), (streams,))
    since: Array = np.arange(1, ticks + 1) - first[:, None]
    return since


def _check_share(share: Array) -> None:
    if share.ndim != 2 or not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"share must be (N, T) with entries in [0, 1], got shape {share.shape}")


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number!r}")
