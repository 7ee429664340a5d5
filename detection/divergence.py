"""Fisher divergence: how far apart two laws are for a detector that sees only scores."""

from dataclasses import dataclass

import numpy as np

from detection.laws import Gaussian, Law, NormalisedLaw, ScoredLaw


def fisher_divergence(law: Gaussian, reference: Gaussian) -> float:
    """``D_F(P || Q) = 0.5 E_P |s_P - s_Q|^2`` of two Gaussians, ``P = law``. Some texts omit the half; we keep it.

    With it, the drift of the score-based statistic is a difference of divergences. Raises ``ValueError`` where dimensions differ, and for
    other laws, whose divergence :func:`sampled_divergence` estimates.

    >>> fisher_divergence(Gaussian(1.0, 1.0), Gaussian(0.0, 1.0))
    0.5
    """
    for given in (law, reference):
        if not isinstance(given, Gaussian):
            raise ValueError(f"the divergence is known in closed form for two Gaussians, got {given!r}; use sampled_divergence")
    if law.dimension != reference.dimension:
        raise ValueError(f"laws must share one dimension, got {law.dimension} and {reference.dimension}")
    away = reference.precision @ (np.atleast_1d(np.asarray(law.mean)) - np.atleast_1d(np.asarray(reference.mean)))
    difference = reference.precision - law.precision
    return float(0.5 * (np.trace(difference @ law.covariance @ difference) + away @ away))


@dataclass(frozen=True, kw_only=True)
class SampledDivergence:
    """An estimate of ``D_F(P || Q)``: its ``value``, its ``standard_error``, and the number ``num`` of draws from ``P`` behind both."""

    value: float
    standard_error: float
    num: int


def sampled_divergence(law: Law, reference: Law, rng: np.random.Generator, num: int = 10_000) -> SampledDivergence:
    """``D_F(law || reference)`` of any two laws with scores, as half the mean squared difference of scores over draws from ``law``.

    The standard error takes the draws for independent. Raises ``ValueError`` for fewer than two draws, for laws of different dimensions,
    and where the scores of a draw are not finite.

    >>> far = sampled_divergence(Gaussian(1.0, 1.0), Gaussian(0.0, 1.0), np.random.default_rng(0), num=100)
    >>> far.value, far.standard_error
    (0.5, 0.0)
    """
    if num < 2:
        raise ValueError(f"num must be at least 2 draws, got {num!r}")
    sizes = {given.dimension for given in (law, reference) if isinstance(given, NormalisedLaw | ScoredLaw)}
    if len(sizes) > 1:
        raise ValueError(f"laws must share one dimension, got {law!r} and {reference!r}")
    draws = law.sample(rng, num)
    squares = np.square(law.score(draws) - reference.score(draws))
    halves = 0.5 * squares.reshape(num, -1).sum(axis=1)
    if not np.isfinite(halves).all():
        raise ValueError(f"scores must be finite at draws of {law!r}, got {int((~np.isfinite(halves)).sum())} of {num} that are not")
    return SampledDivergence(value=float(halves.mean()), standard_error=float(halves.std(ddof=1) / np.sqrt(num)), num=num)
