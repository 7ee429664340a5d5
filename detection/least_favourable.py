"""The least favourable pair: the two laws of the pre- and post-change sets that are hardest to tell apart by their scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from detection.divergence import fisher_divergence
from detection.increment import Quadratic, score_increment
from detection.laws import Gaussian
from detection.multiplier import gaussian, moments_of
from detection.uncertainty import GaussianBox, Interval, UncertaintySet


@dataclass(frozen=True, kw_only=True)
class LeastFavourablePair:
    """``(pre, post)`` closest in Fisher divergence; arXiv:2407.11094.

    ``divergence`` is ``D_F(post || pre)``; ``margins`` are the largest drift of ``S_H(x, pre) - S_H(x, post)`` over the pre-change set
    and the least over the post-change set, verified to lie on either side of 0.
    """

    pre: Gaussian
    post: Gaussian
    divergence: float
    margins: tuple[float, float]


def least_favourable(pre: UncertaintySet, post: UncertaintySet, *, clip: float | None = None) -> LeastFavourablePair:
    """Closest pair of ``pre`` and ``post`` (boxes in closed form, finite sets pair by pair), with its drifts verified for clipped observations.

    Closest is not enough on the pre-change side, so the drift is checked under every extreme law of both sets. Raises ``ValueError``
    naming the offending law and its drift, and for sets that meet, naming the common point.
    """
    pairs = [closest(a, b) for a in _pieces(pre) for b in _pieces(post)]
    pre_law, post_law = min(pairs, key=lambda pair: fisher_divergence(pair[1], pair[0]))
    increment = score_increment(pre_law, post_law, clip)
    drift = moments_of(increment).mean
    worst_pre = max(members(pre, pre_law, increment), key=drift)
    worst_post = min(members(post, post_law, increment), key=drift)
    margins = drift(worst_pre), drift(worst_post)
    hint = "narrow the sets, or let the post-change variances reach those before the change" + (
        "" if clip is None else f"; observations are clipped at {clip}"
    )
    if margins[0] >= 0:
        raise ValueError(
            f"pre-change law {worst_pre!r} drifts by {margins[0]:+.4f}, not below 0: the detector would alarm for ever in control; {hint}"
        )
    if margins[1] <= 0:
        raise ValueError(
            f"post-change law {worst_post!r} drifts by {margins[1]:+.4f}, not above 0: the detector would never catch it; {hint}"
        )
    return LeastFavourablePair(pre=pre_law, post=post_law, divergence=fisher_divergence(post_law, pre_law), margins=margins)


def closest(pre: GaussianBox | Gaussian, post: GaussianBox | Gaussian) -> tuple[Gaussian, Gaussian]:
    """The members of two boxes (or the laws themselves) with the least ``D_F(post || pre)``. Raises ``ValueError`` for sets that meet."""
    if isinstance(pre, Gaussian) or isinstance(post, Gaussian):
        if not (isinstance(pre, Gaussian) and isinstance(post, Gaussian)):
            raise ValueError(f"sets must share one dimension, got {pre!r} and {post!r}")
        if pre == post:
            raise ValueError(f"pre- and post-change sets must be apart, but both hold {pre!r}")
        return pre, post
    low, high = _nearest(pre.mean, post.mean)
    gap = abs(high - low)
    (a0, b0), (a1, b1) = pre.variance, post.variance
    v0 = min(max(b1 + gap**2, a0), b0)
    v1 = min(max(v0, a1), b1)
    if gap == 0 and v0 == v1:
        raise ValueError(f"pre- and post-change sets must be apart, but both hold {Gaussian(low, v0)!r}")
    return Gaussian(low, v0), Gaussian(high, v1)


def members(laws: UncertaintySet, own: Gaussian, increment: object) -> Sequence[Gaussian]:
    """Laws that decide what a promise about ``laws`` is worth: the extreme ones, ``own``, and for a box the means at which drift turns."""
    chosen = [gaussian(law) for law in laws.extreme()]
    if isinstance(laws, GaussianBox):
        turns = {own.mean}
        if isinstance(increment, Quadratic) and increment.curvature:
            turns.add(-increment.slope / (2.0 * increment.curvature))
        variances = dict.fromkeys(law.variance for law in chosen)
        chosen += [Gaussian(m, v) for m in turns if laws.mean[0] <= m <= laws.mean[1] for v in variances]  # type: ignore[operator]
    return tuple(dict.fromkeys(chosen))


def _pieces(laws: UncertaintySet) -> list[GaussianBox | Gaussian]:
    if isinstance(laws, GaussianBox):
        return [laws]
    return [_point(gaussian(law)) for law in laws.extreme()]


def _point(law: Gaussian) -> GaussianBox | Gaussian:
    if law.dimension:
        return law
    return GaussianBox(mean=(law.mean, law.mean), variance=(law.variance, law.variance))  # type: ignore[arg-type]


def _nearest(first: Interval, second: Interval) -> tuple[float, float]:
    """The closest points of two intervals; their overlap's middle, twice, where they meet."""
    if first[1] < second[0]:
        return first[1], second[0]
    if second[1] < first[0]:
        return first[0], second[1]
    middle = (max(first[0], second[0]) + min(first[1], second[1])) / 2
    return middle, middle
