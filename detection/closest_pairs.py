"""The two members of two uncertainty sets that are closest in Fisher divergence, whatever the sets are.

Boxes in closed form, sets of means as a convex problem, a hull after the change by Frank-Wolfe steps. Where the pre-change law is free and
the other set is a hull, both are improved in turn from several starts: that problem is not convex, and its end may be a local least.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detection.divergence import fisher_divergence
from detection.expectations import DRAWS
from detection.frank_wolfe import ZERO, Closest, Pooled, closest_mixture, nearest_reference, scores_at
from detection.gaussian_means import GaussianMeans, closest_means
from detection.hulls import Hull, MixtureHull, SampledSet
from detection.laws import Array, Gaussian, Law
from detection.uncertainty import GaussianBox, Interval, UncertaintySet

Piece = GaussianBox | GaussianMeans | MixtureHull | SampledSet | Law
_TURNS = 200


@dataclass(frozen=True, kw_only=True)
class ClosestPair:
    """``pre`` and ``post`` with ``divergence = D_F(post || pre)``, at most ``gap`` above what another ``post`` of its set reaches.

    Where a set is a hull, its weights are those of the member chosen; empty otherwise.
    """

    pre: Law
    post: Law
    divergence: float
    gap: float = 0.0
    pre_weights: tuple[float, ...] = ()
    post_weights: tuple[float, ...] = ()


def closest_pair(
    pre: UncertaintySet, post: UncertaintySet, *, rng: np.random.Generator | None = None, num: int = DRAWS, tol: float = 1e-9
) -> ClosestPair:
    """The closest members of ``pre`` and ``post``, with no check that a statistic built on them drifts the right way.

    ``rng`` draws ``num`` observations where a divergence is not known otherwise; hulls are searched until the gap is ``tol`` of the
    divergence. Raises ``ValueError`` for sets that meet, naming the common law, and for sets of different dimensions.
    """
    pairs = [_closest(a, b, rng, num, tol) for a in _pieces(pre) for b in _pieces(post)]
    return min(pairs, key=lambda pair: pair.divergence)


def closest(pre: GaussianBox | Gaussian, post: GaussianBox | Gaussian) -> tuple[Gaussian, Gaussian]:
    """The members of two boxes (or the laws themselves) with the least ``D_F(post || pre)``. Raises ``ValueError`` for sets that meet."""
    if isinstance(pre, Gaussian) or isinstance(post, Gaussian):
        if not (isinstance(pre, Gaussian) and isinstance(post, Gaussian)):
            raise ValueError(f"sets must share one dimension, got {pre!r} and {post!r}")
        if pre == post:
            raise _meeting(pre)
        return pre, post
    low, high = _nearest(pre.mean, post.mean)
    gap = abs(high - low)
    (a0, b0), (a1, b1) = pre.variance, post.variance
    v0 = min(max(b1 + gap**2, a0), b0)
    v1 = min(max(v0, a1), b1)
    if gap == 0 and v0 == v1:
        raise _meeting(Gaussian(low, v0))
    return Gaussian(low, v0), Gaussian(high, v1)


def _closest(pre: Piece, post: Piece, rng: np.random.Generator | None, num: int, tol: float) -> ClosestPair:
    gap = 0.0
    if isinstance(pre, GaussianBox | Gaussian) and isinstance(post, GaussianBox | Gaussian):
        before, after = closest(pre, post)
    elif isinstance(pre, GaussianMeans | Gaussian) and isinstance(post, GaussianMeans | Gaussian):
        before, after, gap = closest_means(pre, post)
    elif isinstance(pre, GaussianMeans | GaussianBox) and isinstance(post, GaussianMeans | GaussianBox):
        raise ValueError(f"sets must share one dimension, got {pre!r} and {post!r}")
    else:
        return _closest_to_hull(pre, _as_hull(post), rng, num, tol)
    return ClosestPair(pre=before, post=after, divergence=fisher_divergence(after, before), gap=gap)


def _closest_to_hull(pre: Piece, post: Hull, rng: np.random.Generator | None, num: int, tol: float) -> ClosestPair:
    hull = Pooled.of(post, post.pooled(rng, num))
    references = _References(pre, hull)
    ends = [_alternated(references, start, hull, tol) for start in references.starts()]
    law, weights, end = min(ends, key=lambda found: found[2].divergence)
    square = float(hull.mass @ (scores_at(law, hull.points) ** 2).sum(axis=1))
    if end.divergence <= ZERO * square:
        raise _meeting(law)
    post_weights = tuple(end.weights.tolist())
    return ClosestPair(
        pre=law,
        post=post.member(post_weights),
        divergence=end.divergence,
        gap=end.gap,
        pre_weights=weights,
        post_weights=post_weights if len(post_weights) > 1 else (),
    )


def _alternated(references: "_References", start: tuple[Law, Array], hull: Pooled, tol: float) -> tuple[Law, tuple[float, ...], Closest]:
    """Improves the post-change mixture and the pre-change law in turn, and ends with the mixture: its gap is for that very law."""
    law, weights = start
    end = closest_mixture(hull, scores_at(law, hull.points), tol)
    for _ in range(_TURNS if references.free else 0):
        law, weights = references.refitted(end.weights, weights)
        following = closest_mixture(hull, scores_at(law, hull.points), tol, end.weights)
        settled = following.divergence >= end.divergence * (1 - 1e-10)
        end = following
        if settled:
            break
    return law, tuple(weights.tolist()), end


class _References:
    """The pre-change laws of ``pre``: where to start, and which is closest to a mixture of the post-change ``hull``."""

    def __init__(self, pre: Piece, hull: Pooled) -> None:
        self.pre, self.hull = pre, hull
        self.free = isinstance(pre, GaussianBox | GaussianMeans) or (isinstance(pre, MixtureHull | SampledSet) and len(pre.laws) > 1)
        if self.free and isinstance(pre, MixtureHull | SampledSet):
            self.log_odds = pre.log_odds(hull.points)
            self.scores = np.stack([scores_at(law, hull.points) for law in pre.laws], axis=1)

    def starts(self) -> list[tuple[Law, Array]]:
        """Laws, and their weights where they are mixtures."""
        if isinstance(self.pre, MixtureHull | SampledSet):
            size = len(self.pre.laws)
            corners = np.eye(size)
            weights = [*corners, np.full(size, 1.0 / size)] if size > 1 else [corners[0]]
            return [(self.pre.member(row.tolist()), row) for row in weights]
        if isinstance(self.pre, GaussianBox | GaussianMeans):
            return [(law, np.empty(0)) for law in (self.pre.centre(), *self.pre.extreme()[:4])]
        return [(self.pre, np.empty(0))]

    def refitted(self, post_weights: Array, weights: Array) -> tuple[Law, Array]:
        """The law closest to the mixture of ``post_weights``; for a hull, a local least from ``weights``."""
        measure, target = self.hull.measure(post_weights), self.hull.score(post_weights)
        if isinstance(self.pre, GaussianBox):
            return _fitted_in_box(self.pre, measure, self.hull.points, target[:, 0]), weights
        if isinstance(self.pre, GaussianMeans):
            mean = measure @ (self.hull.points + target @ self.pre.centre().covariance) / measure.sum()
            return self.pre.closest_to(mean), weights
        assert isinstance(self.pre, MixtureHull | SampledSet)
        found, _ = nearest_reference(measure, target, self.log_odds, self.scores, weights)
        return self.pre.member(found.tolist()), found


def _fitted_in_box(box: GaussianBox, measure: Array, x: Array, target: Array) -> Gaussian:
    """The Gaussian of ``box`` whose score ``p + q x`` is closest to ``target``: the box is a trapezoid in ``(p, q) = (m / v, -1 / v)``."""
    design = np.stack((np.ones_like(x), x))
    square, cross = (design * measure) @ design.T, (design * measure) @ target
    free = np.linalg.solve(square, cross)
    if free[1] < 0 and _inside(box, -free[0] / free[1], -1.0 / free[1]):
        return Gaussian(float(-free[0] / free[1]), float(-1.0 / free[1]))
    corners = [np.array([m / v, -1.0 / v]) for m, v in ((m, v) for v in box.variance for m in box.mean)]
    edges = [(corners[a], corners[b]) for a, b in ((0, 1), (2, 3), (0, 2), (1, 3))]
    found = [_lowest_on(edge, square, cross) for edge in edges]
    p, q = min(found, key=lambda point: float(0.5 * point @ square @ point - cross @ point))
    return Gaussian(float(np.clip(-p / q, *box.mean)), float(np.clip(-1.0 / q, *box.variance)))


def _lowest_on(edge: tuple[Array, Array], square: Array, cross: Array) -> Array:
    start, way = edge[0], edge[1] - edge[0]
    bend = float(way @ square @ way)
    share = float(way @ (cross - square @ start)) / bend if bend > 0 else 0.0
    return start + min(max(share, 0.0), 1.0) * way


def _inside(box: GaussianBox, mean: float, variance: float) -> bool:
    return bool(box.mean[0] <= mean <= box.mean[1] and box.variance[0] <= variance <= box.variance[1])


def _pieces(laws: UncertaintySet) -> Sequence[Piece]:
    if isinstance(laws, GaussianBox | GaussianMeans | MixtureHull | SampledSet):
        return [laws]
    return [_point(law) for law in laws.extreme()]


def _point(law: Law) -> Piece:
    if isinstance(law, Gaussian) and not law.dimension:
        return GaussianBox(mean=(law.mean, law.mean), variance=(law.variance, law.variance))  # type: ignore[arg-type]
    return law


def _as_hull(piece: Piece) -> Hull:
    if isinstance(piece, MixtureHull | SampledSet):
        return piece
    if isinstance(piece, GaussianBox | GaussianMeans):
        return MixtureHull(tuple(piece.extreme()))
    return MixtureHull((piece,))  # type: ignore[arg-type]


def _meeting(law: Law) -> ValueError:
    return ValueError(f"pre- and post-change sets must be apart, but both hold {law!r}")


def _nearest(first: Interval, second: Interval) -> tuple[float, float]:
    """The closest points of two intervals; their overlap's middle, twice, where they meet."""
    if first[1] < second[0]:
        return first[1], second[0]
    if second[1] < first[0]:
        return first[0], second[1]
    middle = (max(first[0], second[0]) + min(first[1], second[1])) / 2
    return middle, middle
