"""SCUSUM with a matrix for its multiplier: ``h_M(x) = S_M(x, Q_inf) - S_M(x, Q_1) + c``, ``S_M = 0.5 s' M s + tr(M J)``, is linear in ``M``.

``M`` and ``c`` maximise ``E_1 h - log E_inf exp(h)``, which is concave and at most ``KL(P_1 || P_inf)`` (Donsker and Varadhan 1975). The bound
is reached by the log-likelihood ratio, which ``M = Sigma`` gives for two Gaussians of covariance ``Sigma``: the delay is then that of CUSUM,
and no density was needed. Exports ``MatrixScoreCUSUM`` and ``RobustMatrixScoreCUSUM``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from detection.closest_pairs import closest_pair
from detection.design import SimulatedPromise, designed_threshold, knows_exactly, simulated_promise
from detection.detector import ReflectedSum
from detection.expectations import DRAWS, Nodes, moments, nodes_of
from detection.hulls import ObservedLaw
from detection.increment import Increment
from detection.laws import Array, Law
from detection.least_favourable import members, verified
from detection.multiplier import CONFIDENCE, multiplier_for
from detection.promise import Promise, promise_of
from detection.robust_score_cusum import covered
from detection.score_cusum import bare
from detection.uncertainty import Singleton, UncertaintySet
from detection.whitening import Matrix, as_matrix, preconditioned_increment, score_matrices

_RIDGE = 1e-7  # of the features' variance: picks the smallest matrix where directions of it move nothing
_ROUNDS, _FIRST, _ENOUGH = 20, 6, 1e-4


@dataclass(frozen=True, kw_only=True)
class MatrixIncrement:
    """Which increment a matrix detector adds up: two laws, the ``matrix`` (d, d), (1, 1) for numbers, and the ``offset``."""

    pre: Law
    post: Law
    matrix: Matrix
    offset: float

    def of(self, clip: float | None) -> Increment:
        """``h_M(x)``, a quadratic where both laws are Gaussian."""
        return preconditioned_increment(self.pre, self.post, self.matrix, offset=self.offset, clip=clip)


@dataclass(frozen=True, kw_only=True)
class _MatrixSum(ReflectedSum):
    pre: UncertaintySet
    post: UncertaintySet
    design: MatrixIncrement
    multiplier: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.multiplier > 0:
            raise ValueError(f"multiplier must be positive, got {self.multiplier!r}")

    def _increment(self) -> Increment:
        return self.design.of(self.clip).scaled(self.multiplier)

    def promise(self, rng: np.random.Generator | None = None) -> Promise | SimulatedPromise:
        """Run length under the worst law of ``pre``, delay under the worst law of ``post``: exact where the distribution of the increment
        is known, else from runs simulated with ``rng``."""
        nulls = tuple(members(self.pre, self.design.pre, self.increment))
        changes = tuple(members(self.post, self.design.post, self.increment))
        if knows_exactly(self.increment, (*nulls, *changes)):
            return promise_of(self, nulls, changes, (self.design.pre, self.design.post))
        return simulated_promise(self, nulls, changes, rng)


@dataclass(frozen=True, kw_only=True)
class MatrixScoreCUSUM(_MatrixSum):
    """``z(x) = multiplier h_M(x)`` for one law before and one after the change, both known by score and Jacobian (:func:`jacobian_of`).

    ``M`` is fitted to draws; the multiplier, near 1, restores ``E exp z <= 1`` on others, so that the run length is at least
    ``exp(threshold)`` however well ``M`` was fitted.
    """

    @classmethod
    def fit(
        cls,
        *,
        pre: UncertaintySet,
        post: UncertaintySet,
        arl: float = 10_000.0,
        clip: float | None = None,
        method: str | None = None,
        rng: np.random.Generator,
        num: int = DRAWS,
        confidence: float = CONFIDENCE,
    ) -> Self:
        """Design for the *centres* of the two sets, from ``num`` draws of each: no promise elsewhere.

        Arguments and errors as for :meth:`detection.ScoreCUSUM.fit`; ``rng`` is needed whatever the laws, and nothing is clipped by default.
        """
        before, after = pre.centre(), post.centre()
        (null, held), (change, seen) = _halves(before, clip, rng, num), _halves(after, clip, rng, num)
        matrix, offset = _best_matrix(bare(before), bare(after), null, change, clip)
        design = MatrixIncrement(pre=bare(before), post=bare(after), matrix=matrix, offset=offset)
        increment = design.of(clip)
        verified(increment, (held,), (seen,), clip, rng=rng, num=num, confidence=confidence)
        multiplier = multiplier_for(increment, (held,), rng=rng, num=num, confidence=confidence)
        threshold = designed_threshold(increment.scaled(multiplier), (held,), arl, method=method, rng=rng)
        return cls(pre=Singleton(held), post=Singleton(seen), design=design, multiplier=multiplier, threshold=threshold, clip=clip)


@dataclass(frozen=True, kw_only=True)
class RobustMatrixScoreCUSUM(_MatrixSum):
    """``z(x) = multiplier h_M(x)`` with the largest least drift over ``post`` under ``E exp(h_M) <= 1`` for every law of ``pre``.

    Scores are those of the closest pair; the matrix and the offset, free, reach both sides also where the closest pair itself does not
    separate the sets. Laws that turn out worst are added until the drift over ``post`` and the moments over ``pre`` hold.
    """

    @classmethod
    def fit(
        cls,
        *,
        pre: UncertaintySet,
        post: UncertaintySet,
        arl: float = 10_000.0,
        clip: float | None = None,
        method: str | None = None,
        rng: np.random.Generator,
        num: int = DRAWS,
        confidence: float = CONFIDENCE,
    ) -> Self:
        """Arguments and errors as for :meth:`detection.RobustScoreCUSUM.fit`; nothing is clipped by default.

        Raises ``ValueError`` where no matrix separates the sets, naming the law and its drift.
        """
        pair = closest_pair(pre, post, rng=rng, num=num)
        design = _robust_design(pre, post, pair.pre, pair.post, clip, rng, num)
        increment = design.of(clip)
        nulls, changes = members(pre, pair.pre, increment), members(post, pair.post, increment)
        verified(increment, nulls, changes, clip, rng=rng, num=num, confidence=confidence)
        nulls, multiplier = covered(pre, increment, nulls, rng, num, confidence)
        threshold = designed_threshold(increment.scaled(multiplier), nulls, arl, method=method, rng=rng)
        return cls(pre=pre, post=post, design=design, multiplier=multiplier, threshold=threshold, clip=clip)


def _best_matrix(pre: Law, post: Law, null: Nodes, change: Nodes, clip: float | None) -> tuple[Matrix, float]:
    """Maximiser of ``E_1 h_M - log E_inf exp(h_M)`` less a ridge, by damped Newton steps, and the offset that makes ``E_inf exp h = 1``."""
    features, target = _features(pre, post, null.points, clip), _features(pre, post, change.points, clip)
    scale = _scale(features, null.log_weights)
    features, goal = features / scale, np.exp(change.log_weights) @ (target / scale)
    weights = np.zeros(features.shape[1])

    def normaliser(point: Array) -> tuple[float, Array]:
        parts = features @ point + null.log_weights
        top = parts.max()
        tilted = np.exp(parts - top)
        total = tilted.sum()
        return float(top + np.log(total)), tilted / total

    def objective(point: Array) -> float:
        return float(goal @ point) - normaliser(point)[0] - 0.5 * _RIDGE * float(point @ point)

    value = objective(weights)
    for _ in range(100):
        tilted = normaliser(weights)[1]
        mean = tilted @ features
        gradient = goal - mean - _RIDGE * weights
        bend = (features * tilted[:, None]).T @ features - np.outer(mean, mean) + _RIDGE * np.eye(len(weights))
        way = np.linalg.solve(bend, gradient)
        size = 1.0
        while (better := objective(weights + size * way)) < value + 1e-4 * size * float(gradient @ way) and size > 1e-10:
            size /= 2.0
        gain, weights, value = better - value, weights + size * way, better
        if abs(gain) <= 1e-12 * max(1.0, abs(value)):
            break
    return _matrix(weights / scale), -normaliser(weights)[0]


def _robust_design(
    pre: UncertaintySet, post: UncertaintySet, before: Law, after: Law, clip: float | None, rng: np.random.Generator, num: int
) -> MatrixIncrement:
    """Solves for a few laws of each set, adds those that then have the highest moment and the least drift, and solves again."""
    tables = _Tables(before, after, clip, rng, num)
    nulls, changes = list(pre.extreme()[:_FIRST]), list(post.extreme()[:_FIRST])
    for _ in range(_ROUNDS):
        weights, offset, least = _max_min_drift([tables.of(law) for law in nulls], [tables.of(law) for law in changes])
        design = MatrixIncrement(pre=before, post=after, matrix=_matrix(weights), offset=offset)
        increment = design.of(clip)
        laws = [law for law in members(pre, before, increment) if law not in nulls]
        levels = [moments(increment, law, rng=rng, num=num).log_moment(1.0) for law in laws]
        others = [law for law in members(post, after, increment) if law not in changes]
        drifts = [moments(increment, law, rng=rng, num=num).drift().value for law in others]
        high = [laws[k] for k in np.argsort(levels)[-2:] if levels[k] > _ENOUGH]
        low = [others[k] for k in np.argsort(drifts)[:2] if drifts[k] < least * (1 - _ENOUGH)]
        if not high and not low:
            break
        nulls, changes = nulls + high, changes + low
    return design


class _Tables:
    """Nodes and features of laws, each computed once; the same draws serve every round, so that the rounds settle."""

    def __init__(self, before: Law, after: Law, clip: float | None, rng: np.random.Generator, num: int) -> None:
        self._features: Callable[[Array], Array] = lambda x: _features(before, after, x, clip)
        self._nodes: Callable[[Law], Nodes] = lambda law: nodes_of(law, clip=clip, rng=rng, num=num)
        self._known: dict[Law, tuple[Array, Array]] = {}

    def of(self, law: Law) -> tuple[Array, Array]:
        """Features (n, p) and log-weights (n,)."""
        if law not in self._known:
            nodes = self._nodes(law)
            self._known[law] = self._features(nodes.points), nodes.log_weights
        return self._known[law]


def _max_min_drift(nulls: Sequence[tuple[Array, Array]], changes: Sequence[tuple[Array, Array]]) -> tuple[Array, float, float]:
    """Weights, offset and least drift of the ``h`` with the largest least drift over ``changes`` and ``E exp(h) <= 1`` over ``nulls``."""
    from scipy.optimize import minimize

    scale = np.max([_scale(features, log_weights) for features, log_weights in nulls], axis=0)
    goals = np.stack([np.exp(log_weights) @ features for features, log_weights in changes]) / scale
    tables = [(features / scale, log_weights) for features, log_weights in nulls]
    size = goals.shape[1]

    def levels(point: Array) -> tuple[Array, Array]:
        values, slopes = np.empty(len(tables)), np.empty((len(tables), size))
        for k, (features, log_weights) in enumerate(tables):
            parts = features @ point[:size] + log_weights
            top = parts.max()
            tilted = np.exp(parts - top)
            total = tilted.sum()
            values[k], slopes[k] = top + np.log(total) + point[size], (tilted / total) @ features
        return values, slopes

    ones, none = np.ones((len(goals), 1)), np.zeros((len(tables), 1))
    rise = np.hstack((goals, ones, -ones))
    constraints = (
        {"type": "ineq", "fun": lambda v: rise @ v, "jac": lambda v: rise},
        {"type": "ineq", "fun": lambda v: -levels(v)[0], "jac": lambda v: -np.hstack((levels(v)[1], none + 1.0, none))},
    )
    last = np.eye(size + 2)[-1]
    tilt = _RIDGE * np.append(np.ones(size), (0.0, 0.0))
    found = minimize(
        lambda v: -float(v[-1]) + 0.5 * float(tilt @ v**2),
        np.zeros(size + 2),
        jac=lambda v: tilt * v - last,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    least = float(found.x[-1])
    if not np.isfinite(found.x).all() or not least > 1e-8:
        raise ValueError(
            f"no matrix separates the sets: with E exp(h) <= 1 before the change, the least drift after it is at most {least:.2g}; narrow the sets"
        )
    return found.x[:size] / scale, float(found.x[size]), least


def _features(pre: Law, post: Law, x: Array, clip: float | None) -> Array:
    """``(n, d (d + 1) / 2)``: what multiplies the entries of a symmetric matrix, those off the diagonal counted twice."""
    x = x if clip is None else np.clip(x, -clip, clip)
    matrices = score_matrices(pre, post, x)
    rows, columns = np.triu_indices(matrices.shape[1])
    return np.asarray(matrices[:, rows, columns] * np.where(rows == columns, 1.0, 2.0))


def _matrix(weights: Array) -> Matrix:
    size = round((np.sqrt(8 * len(weights) + 1) - 1) / 2)
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = weights
    return as_matrix(matrix + np.triu(matrix, 1).T)


def _scale(features: Array, log_weights: Array) -> Array:
    """Standard deviations of the features, 1 for those that do not vary."""
    weights = np.exp(log_weights)
    spread = np.sqrt(weights @ (features - weights @ features) ** 2)
    return np.where(spread > 1e-10 * spread.max(), spread, 1.0)


def _halves(law: Law, clip: float | None, rng: np.random.Generator, num: int) -> tuple[Nodes, Law]:
    """Nodes that fit the matrix, and the law as it verifies it: by the other half where it is known by observations, else by other draws."""
    if isinstance(law, ObservedLaw):
        mixed = rng.permutation(law.draws)
        return Nodes.of_draws(mixed[::2]), ObservedLaw(law.law, mixed[1::2])
    return nodes_of(law, clip=clip, rng=rng, num=num), law
