"""The least favourable pair: the two laws of the pre- and post-change sets that are hardest to tell apart by their scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from detection.closest_pairs import closest, closest_pair
from detection.expectations import DRAWS, Estimate, moments
from detection.gaussian_means import GaussianMeans
from detection.increment import Increment, Quadratic, QuadraticForm, score_increment
from detection.laws import Gaussian, Law
from detection.multiplier import CONFIDENCE
from detection.uncertainty import GaussianBox, UncertaintySet

__all__ = ["LeastFavourablePair", "closest", "least_favourable", "members"]


@dataclass(frozen=True, kw_only=True)
class LeastFavourablePair:
    """``(pre, post)`` closest in Fisher divergence; arXiv:2407.11094.

    ``divergence`` is ``D_F(post || pre)``; ``margins`` are the largest drift of ``S_H(x, pre) - S_H(x, post)`` over the pre-change set
    and the least over the post-change set, verified to lie on either side of 0, with ``standard_errors`` where they come from draws.

    ``gap`` certifies the post-change law: no member of its set drifts by less than ``divergence - gap`` (on the observations that placed it,
    where the set is sampled); 0 for means of one covariance. A box of variances is not convex, so its least drift may fall short of the divergence. ``weights`` and ``pre_weights`` are those of mixtures chosen from hulls, empty otherwise.
    """

    pre: Law
    post: Law
    divergence: float
    margins: tuple[float, float]
    standard_errors: tuple[float, float] = (0.0, 0.0)
    gap: float = 0.0
    weights: tuple[float, ...] = ()
    pre_weights: tuple[float, ...] = ()


def least_favourable(
    pre: UncertaintySet,
    post: UncertaintySet,
    *,
    clip: float | None = None,
    rng: np.random.Generator | None = None,
    num: int = DRAWS,
    confidence: float = CONFIDENCE,
    tol: float = 1e-9,
) -> LeastFavourablePair:
    """Closest pair of ``pre`` and ``post``, with its drifts verified for observations clipped at ``clip``.

    Boxes are solved in closed form, finite sets pair by pair, sets of means and hulls as convex problems to ``tol``. What is not known in
    closed form or by quadrature is estimated from ``num`` draws of ``rng`` a law. Closest is not enough on the pre-change side, so the drift is
    checked under every extreme law of both sets; where it is estimated, with ``confidence`` for all of them together. Raises ``ValueError``
    naming the offending law and its drift, and for sets that meet, naming the common law.
    """
    found = closest_pair(pre, post, rng=rng, num=num, tol=tol)
    increment = score_increment(found.pre, found.post, clip)
    below, above = verified(
        increment, members(pre, found.pre, increment), members(post, found.post, increment), clip, rng=rng, num=num, confidence=confidence
    )
    return LeastFavourablePair(
        pre=found.pre,
        post=found.post,
        divergence=found.divergence,
        margins=(below.value, above.value),
        standard_errors=(below.standard_error, above.standard_error),
        gap=found.gap if found.post_weights or found.pre_weights else _gap(found.divergence - above.value),
        weights=found.post_weights,
        pre_weights=found.pre_weights,
    )


def _gap(loss: float) -> float:
    """Of sets that no mixture stands for: what the least drift, verified over the whole set, falls short of the divergence by."""
    return loss if loss > 1e-12 else 0.0


def verified(
    increment: Increment,
    nulls: Sequence[Law],
    changes: Sequence[Law],
    clip: float | None,
    *,
    rng: np.random.Generator | None = None,
    num: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> tuple[Estimate, Estimate]:
    """The largest drift of ``increment`` under the ``nulls``, below 0, and the least under the ``changes``, above 0; else ``ValueError``."""
    quantile = float(scipy.special.ndtri(1 - (1 - confidence) / (len(nulls) + len(changes))))
    hint = "narrow the sets, or let the post-change variances reach those before the change" + (
        "" if clip is None else f"; observations are clipped at {clip}"
    )
    below = [(law, moments(increment, law, rng=rng, num=num).drift()) for law in nulls]
    law, worst_pre = max(below, key=lambda found: found[1].value + quantile * found[1].standard_error)
    if worst_pre.value >= 0:
        raise ValueError(
            f"pre-change law {law!r} drifts by {worst_pre.value:+.4f}, not below 0: the detector would alarm for ever in control; {hint}"
        )
    _refuse_unsure("pre-change", law, worst_pre, quantile, confidence)
    above = [(law, moments(increment, law, rng=rng, num=num).drift()) for law in changes]
    law, worst_post = min(above, key=lambda found: found[1].value - quantile * found[1].standard_error)
    if worst_post.value <= 0:
        raise ValueError(
            f"post-change law {law!r} drifts by {worst_post.value:+.4f}, not above 0: the detector would never catch it; {hint}"
        )
    _refuse_unsure("post-change", law, worst_post, quantile, confidence)
    return worst_pre, worst_post


def members(laws: UncertaintySet, own: Law, increment: object) -> Sequence[Law]:
    """Laws that decide what a promise about ``laws`` is worth: the extreme ones; for a box ``own`` and the means at which drift turns too,
    for a set of means ``own`` and the members of the largest and the least drift."""
    chosen: list[Law] = list(laws.extreme())
    if isinstance(laws, GaussianBox):
        turns = {own.mean} if isinstance(own, Gaussian) else set()
        if isinstance(increment, Quadratic) and increment.curvature:
            turns.add(-increment.slope / (2.0 * increment.curvature))
        variances = dict.fromkeys(law.variance for law in chosen)  # type: ignore[attr-defined]
        chosen += [Gaussian(m, v) for m in turns if laws.mean[0] <= m <= laws.mean[1] for v in variances]  # type: ignore[operator]
    if isinstance(laws, GaussianMeans):
        chosen.append(own)
        if isinstance(increment, QuadraticForm):
            curvature, slope = np.asarray(increment.curvature), np.asarray(increment.slope)
            chosen += [laws.highest(curvature, slope), laws.highest(-curvature, -slope)]
    return tuple(dict.fromkeys(chosen))


def _refuse_unsure(side: str, law: Law, drift: Estimate, quantile: float, confidence: float) -> None:
    if abs(drift.value) <= quantile * drift.standard_error:
        raise ValueError(
            f"the drift under {side} law {law!r} is {drift.value:+.4f} with standard error {drift.standard_error:.4f}: its sign is not established "
            f"at confidence {confidence:g}; take more draws, or move the sets apart"
        )
