"""The law of a convex hull that is closest to another law in Fisher divergence, with a certificate.

For a fixed reference ``Q`` the map ``P -> D_F(P || Q)`` is convex on densities, so its least over the mixtures ``P_w = sum w_k R_k`` is found
by pairwise Frank-Wolfe steps (Lacoste-Julien and Jaggi 2015). The derivative toward a component is the drift, under it, of the statistic
built on ``(Q, P_w)``: at the optimum no component drifts less than the mixture itself. Exports ``Pooled``, ``closest_mixture``, ``nearest_reference``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from detection.expectations import Nodes, stacked
from detection.hulls import Hull
from detection.laws import Array, Law

ZERO = 1e-11  # a divergence that is 0 to rounding, over the mean square of the scores
_STEPS = 2000


@dataclass(frozen=True, eq=False)
class Closest:
    """Mixture ``weights`` (K,), their ``divergence``, and ``gap``: how much less than it a component may drift, so how far it is from the least."""

    weights: Array
    divergence: float
    gap: float


@dataclass(frozen=True, eq=False)
class Pooled:
    """A hull seen at ``points`` of its equal mixture: ``mass`` (n,), ``log_odds`` (n, K) and ``scores`` (n, K, d) of the components.

    The empirical divergence, an average over the points of ``(p_w / p) 0.5 |s_w - s_Q|^2``, is convex in ``w`` whatever the points are.
    """

    points: Array
    mass: Array
    log_odds: Array
    scores: Array

    @classmethod
    def of(cls, hull: Hull, nodes: Nodes) -> "Pooled":
        """``hull`` at ``nodes``, which stand for its equal mixture; those without mass are left out."""
        nodes = nodes.with_mass()
        x = nodes.points
        log_odds = hull.log_odds(x)
        scores = np.stack([scores_at(law, x) for law in hull.laws], axis=1)
        return cls(x, np.exp(nodes.log_weights), log_odds - log_odds.max(axis=1, keepdims=True), scores)

    @property
    def ratios(self) -> Array:
        """Density of each component over that of the equal mixture, (n, K)."""
        odds = np.exp(self.log_odds)
        return np.asarray(odds * (odds.shape[1] / odds.sum(axis=1, keepdims=True)))

    def score(self, weights: Array) -> Array:
        """Score of the mixture, (n, d)."""
        return np.asarray(np.einsum("nk,nkd->nd", responsibilities(self.log_odds, weights), self.scores))

    def measure(self, weights: Array) -> Array:
        """Weights (n,) of the points as a sample of the mixture."""
        return self.mass * (self.ratios @ weights)


def scores_at(law: Law, x: Array) -> Array:
    """Scores (n, d) of ``law``, d = 1 for numbers. Raises ``ValueError`` where they are not finite."""
    score = law.score(x)
    score = stacked(score, np.empty(len(x)))
    if not np.isfinite(score).all():
        raise ValueError(f"scores must be finite, but {law!r} has {int((~np.isfinite(score)).any(axis=1).sum())} of {len(x)} that are not")
    return score


def responsibilities(log_odds: Array, weights: Array) -> Array:
    """Probability of each component at each point, (n, K)."""
    with np.errstate(divide="ignore"):
        parts = log_odds + np.log(weights)
    parts -= parts.max(axis=1, keepdims=True)
    np.exp(parts, out=parts)
    parts /= parts.sum(axis=1, keepdims=True)
    return np.asarray(parts)


def closest_mixture(hull: Pooled, reference: Array, tol: float = 1e-9, start: Array | None = None) -> Closest:
    """The mixture with the least ``D_F(P_w || Q)``; ``reference`` (n, d) are the scores of ``Q`` at the hull's points.

    Ends where the gap is at most ``tol`` of the divergence, or the divergence is 0 to rounding; raises ``ValueError`` where the gap stays
    above a thousand times that.
    """
    objective = _Objective(hull, reference)
    weights = objective.closest_component() if start is None else start.copy()
    nothing = ZERO * float(hull.mass @ (reference**2).sum(axis=1))
    for _ in range(_STEPS):
        drifts = objective.drifts(weights)
        divergence = float(weights @ drifts)
        gap = divergence - float(drifts.min())
        if gap <= tol * divergence or divergence <= nothing or len(weights) == 1:
            return Closest(weights, divergence, max(gap, 0.0))
        held = np.flatnonzero(weights)
        source, target = int(held[np.argmax(drifts[held])]), int(drifts.argmin())
        step = objective.best_step(weights, source, target)
        if step == 0.0:
            break
        weights[target] += step
        weights[source] = 0.0 if step >= weights[source] else weights[source] - step
    if gap > 1e3 * tol * divergence:
        raise ValueError(
            f"the closest mixture was found to {gap:.2g} of {divergence:.4g} only; are components repeated, or the posteriors degenerate?"
        )
    return Closest(weights, divergence, gap)


class _Objective:
    def __init__(self, hull: Pooled, reference: Array) -> None:
        self.log_odds = hull.log_odds
        self.away = hull.scores - reference[:, None, :]
        self.masses = hull.mass[:, None] * hull.ratios

    def drifts(self, weights: Array) -> Array:
        """Drift of the statistic of ``(Q, P_w)`` under every component, the gradient of the divergence; its mean over ``w`` is ``D_F``."""
        apart = np.einsum("nk,nkd->nd", responsibilities(self.log_odds, weights), self.away)
        return np.asarray(
            np.einsum("nk,nkd,nd->k", self.masses, self.away, apart, optimize=True) - 0.5 * (apart**2).sum(axis=1) @ self.masses
        )

    def closest_component(self) -> Array:
        """All weight on the component of least divergence."""
        corners = np.eye(self.log_odds.shape[1])
        return np.asarray(corners[int(np.argmin([self.drifts(corner) @ corner for corner in corners]))])

    def best_step(self, weights: Array, source: int, target: int) -> float:
        """How much weight to move from ``source`` to ``target``: the divergence is convex along the way, so its slope changes sign once."""
        from scipy.optimize import brentq

        limit = float(weights[source])

        def slope(step: float) -> float:
            moved = weights.copy()
            moved[target] += step
            moved[source] = max(limit - step, 0.0)
            drifts = self.drifts(moved)
            return float(drifts[target] - drifts[source])

        if slope(0.0) >= 0.0:
            return 0.0
        return limit if slope(limit) <= 0.0 else float(brentq(slope, 0.0, limit, xtol=1e-16, rtol=1e-13))


def nearest_reference(
    measure: Array, target: Array, log_odds: Array, scores: Array, start: Array, tol: float = 1e-12
) -> tuple[Array, float]:
    """Weights of a mixture ``Q`` with small ``D_F(P || Q)``, and that divergence: a descent from ``start`` that may end in a local least.

    ``measure`` (n,) and ``target`` (n, d) are ``P`` and its score at the points, ``log_odds`` (n, K) and ``scores`` (n, K, d) those of the
    components of ``Q``. The divergence is not convex in its second argument: moves of weight between pairs are searched in turn.
    """

    def divergence(weights: Array) -> float:
        apart = target - np.einsum("nk,nkd->nd", responsibilities(log_odds, weights), scores)
        return float(0.5 * measure @ (apart**2).sum(axis=1))

    weights, best = start.copy(), divergence(start)
    for _ in range(100):
        before = best
        for first, second in combinations(range(len(weights)), 2):
            weights, best = _best_share(divergence, weights, best, first, second)
        if before - best <= tol * max(best, 1e-300):
            break
    return weights, best


def _best_share(divergence: Callable[[Array], float], weights: Array, best: float, first: int, second: int) -> tuple[Array, float]:
    """``weights`` with what two components hold shared out anew, if that lowers the divergence below ``best``."""
    from scipy.optimize import minimize_scalar

    room = float(weights[first] + weights[second])
    if room <= 0.0:
        return weights, best

    def shared(share: float) -> Array:
        other = weights.copy()
        other[first], other[second] = share * room, (1.0 - share) * room
        return other

    found = minimize_scalar(lambda share: divergence(shared(share)), bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-9})
    values = {share: divergence(shared(share)) for share in (0.0, float(found.x), 1.0)}
    share = min(values, key=values.__getitem__)
    return (shared(share), values[share]) if values[share] < best else (weights, best)
