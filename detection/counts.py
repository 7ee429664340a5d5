"""CUSUM of counts: exact log-likelihood ratios for hits and misses, and for class counts, which see a class-prior shift the loss misses.

Discrete streams have no normal scores. Here ``E exp(z) = 1`` before the change without a multiplier, so ``log(arl)`` is a safe threshold;
:meth:`BernoulliCUSUM.fit` gives the exact one (Reynolds and Stoumbos 1999 take the lattice case, ours needs no lattice).
"""

from dataclasses import dataclass, field, replace
from math import inf, log
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from detection.bank import Bank
from detection.calibration import RunLengths
from detection.detector import ReflectedSum
from detection.laws import Array, ByValue


@dataclass(frozen=True, eq=False)
class CountWeights(ByValue):
    """``z(x) = sum_k x_k weights_k`` of class counts ``x`` (n, K); ``weights`` (K,), or (N, K) with one row a stream."""

    weights: Array

    def __call__(self, x: Array) -> Array:
        """``(n, K) -> (n,)``, summed class by class so that a row's bits do not depend on its neighbours."""
        if x.shape[-1:] != self.weights.shape[-1:]:
            raise ValueError(f"counts must have shape (streams, {self.weights.shape[-1]}), got {x.shape}")
        if not (x >= 0).all():
            raise ValueError(f"counts must not be negative, got {x.min()!r}")
        z = np.zeros(x.shape[:-1])
        for k in range(self.weights.shape[-1]):
            z += x[..., k] * self.weights[..., k]
        return z

    def scaled(self, multiplier: float) -> "CountWeights":
        """``multiplier * z``."""
        return CountWeights(multiplier * self.weights)

    def at(self, rows: slice) -> "CountWeights":
        """With the weights of ``rows``."""
        return self if self.weights.ndim == 1 else CountWeights(self.weights[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class CountsCUSUM(ByValue, ReflectedSum):
    """``z = sum_k x_k log(post_k / pre_k)`` of the counts ``x`` (N, K) of one tick: any number of trials, also none.

    ``pre`` and ``post`` are probabilities of the K classes: (K,), or (N, K) with one row a stream. Every one must be above 0
    (:func:`smoothed`), since an impossible class would end the test.
    """

    pre: Array
    post: Array
    clip: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pre", "post"):
            object.__setattr__(self, name, _probabilities(getattr(self, name), name))
        if self.pre.shape[-1] != self.post.shape[-1] or (self.pre.ndim == self.post.ndim == 2 and len(self.pre) != len(self.post)):
            raise ValueError(f"pre and post must hold the same classes and streams, got shapes {self.pre.shape} and {self.post.shape}")
        if bool((self.pre == self.post).all()):
            raise ValueError("pre and post must differ: there is no change to detect")

    @classmethod
    def fit(
        cls,
        *,
        pre: ArrayLike,
        post: ArrayLike,
        arl: float,
        trials: int,
        rng: np.random.Generator,
        paths: int = 2000,
        horizon: int = 1000,
    ) -> Self:
        """Certified threshold for one false alarm in ``arl`` ticks of ``trials`` predictions each, simulated; ``pre`` and ``post`` (K,).

        Raises ``ValueError`` where ``paths x horizon`` ticks are too few for ``arl``.
        """
        design = cls(pre=pre, post=post, threshold=log(max(arl, 2.0)))  # type: ignore[arg-type]
        counts = rng.multinomial(trials, _probabilities(pre, "pre"), size=(paths, horizon))
        threshold = RunLengths.of(design.increment(counts.astype(np.float64))).threshold(arl)
        return replace(design, threshold=min(threshold, design.threshold))  # log(arl) is enough

    def _increment(self) -> CountWeights:
        return CountWeights(np.log(self.post) - np.log(self.pre))


def class_bank(pre: ArrayLike, *, odds: float = 2.0, arl: float = 10_000.0) -> Bank:
    """Watches for a class-prior shift of unknown kind: one :class:`CountsCUSUM` a class, its odds multiplied by ``odds``, one by one.

    The threshold ``log(K arl)`` is safe; :func:`detection.calibrated` makes it tight. :meth:`detection.Bank.leader` names the class.
    """
    if not 0 < odds != 1:
        raise ValueError(f"odds must be positive and not 1, got {odds!r}")
    if not arl >= 2:
        raise ValueError(f"arl must be at least 2 ticks, got {arl!r}")
    p = _probabilities(pre, "pre")
    raised = p[..., None, :] * np.where(np.eye(p.shape[-1], dtype=bool), odds, 1.0)  # (..., K designs, K)
    raised /= raised.sum(axis=-1, keepdims=True)
    threshold = log(p.shape[-1] * arl)
    return Bank(
        members=tuple(CountsCUSUM(pre=p, post=raised[..., k, :], threshold=threshold) for k in range(p.shape[-1])), threshold=threshold
    )


def smoothed(counts: ArrayLike) -> Array:
    """Probabilities (..., K) from calibration ``counts`` (..., K), half a count added to each class (Jeffreys), so none is 0.

    >>> smoothed([0, 1, 1]).tolist()
    [0.14285714285714285, 0.42857142857142855, 0.42857142857142855]
    """
    counts = np.asarray(counts, dtype=np.float64) + 0.5
    return np.asarray(counts / counts.sum(axis=-1, keepdims=True), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class HitWeights(ByValue):
    """``z`` is ``hit`` for 1 and ``miss`` for 0: numbers, or (N,) with one a stream."""

    hit: Array
    miss: Array

    def __call__(self, x: Array) -> Array:
        """Elementwise. Raises ``ValueError`` for anything but 0 and 1."""
        wrong = (x != 0) & (x != 1)
        if wrong.any():
            raise ValueError(f"{int(wrong.sum())} observations are neither 0 nor 1, the first is {x[wrong][0]!r}")
        return np.where(x == 1, self.hit, self.miss)

    def scaled(self, multiplier: float) -> "HitWeights":
        """``multiplier * z``."""
        return HitWeights(multiplier * self.hit, multiplier * self.miss)

    def at(self, rows: slice) -> "HitWeights":
        """With the weights of ``rows``."""
        return self if self.hit.ndim == 0 else HitWeights(self.hit[rows], self.miss[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class BernoulliCUSUM(ByValue, ReflectedSum):
    """Log-likelihood ratio of an error rate ``post`` to one of ``pre``, both in (0, 1), for streams of 0 and 1 (1: an error).

    Rates are numbers, or (N,) with one a stream. Whether the rate rises or falls follows from which is larger.

    >>> detector = BernoulliCUSUM.fit(pre=0.1, post=0.2, arl=1000)
    >>> 1000 <= detector.run_length(0.1) < 1100
    True
    """

    pre: float | Array
    post: float | Array
    clip: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pre", "post"):
            rate = np.asarray(getattr(self, name), dtype=np.float64)
            if rate.ndim > 1 or not ((rate > 0) & (rate < 1)).all():
                raise ValueError(f"{name} must be one rate or one a stream, above 0 and below 1, got {getattr(self, name)!r}")
        if np.any(np.asarray(self.pre) == np.asarray(self.post)):
            raise ValueError(f"pre and post must differ, got {self.pre!r} and {self.post!r}")

    @classmethod
    def fit(cls, *, pre: float, post: float, arl: float = 10_000.0) -> Self:
        """Least threshold whose exact run length at the rate ``pre`` is at least ``arl``. Raises ``ValueError`` for ``arl < 2``."""
        if not arl >= 2:
            raise ValueError(f"arl must be at least 2 observations, got {arl!r}")
        design = cls(pre=pre, post=post, threshold=log(arl))
        low, high = 0.0, design.threshold  # log(arl) is enough
        while high - low > 1e-10:
            middle = 0.5 * (low + high)
            low, high = (low, middle) if replace(design, threshold=middle).run_length(pre) >= arl else (middle, high)
        return replace(design, threshold=high + 1e-9)  # run lengths jump at attainable sums: stay clear of rounding

    def run_length(self, rate: float) -> float:
        """Exact mean number of observations to an alarm of a fresh stream, at a true ``rate``: run length or delay ``T - nu + 1``.

        ``inf`` where no alarm can come. Raises ``ValueError`` for a rate outside [0, 1] and for a detector with rates for each stream.
        """
        weights = self._increment()
        if weights.hit.ndim:
            raise ValueError("run_length needs one pre and one post rate; make a detector for the stream of interest")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must lie in [0, 1], got {rate!r}")
        return _mean_run_length(float(weights.hit), float(weights.miss), self.threshold, rate)

    def _increment(self) -> HitWeights:
        pre, post = np.asarray(self.pre, dtype=np.float64), np.asarray(self.post, dtype=np.float64)
        hit, miss = np.broadcast_arrays(np.log(post) - np.log(pre), np.log1p(-post) - np.log1p(-pre))
        return HitWeights(hit, miss)


def _mean_run_length(hit: float, miss: float, threshold: float, rate: float) -> float:
    """Wald's ratio over one excursion from 0: its mean length over the chance that it ends in an alarm.

    The statistic inside an excursion is ``hits * hit + misses * miss``, so its law after each observation is one row over ``hits``.
    """
    if hit < 0:
        hit, miss, rate = miss, hit, 1.0 - rate
    length, alarmed, fewest, tick = 0.0, 0.0, 0, 0
    mass = np.ones(1)
    while mass.size and mass.sum() > 1e-13 * alarmed and mass.sum() > 1e-300:
        length += float(mass.sum())
        tick += 1
        mass = np.append(mass * (1.0 - rate), 0.0) + np.append(0.0, mass * rate)
        value = tick * miss + (fewest + np.arange(len(mass))) * (hit - miss)
        alarmed += float(mass[value >= threshold].sum())
        inside = (value > 0.0) & (value < threshold)
        fewest += int(inside.argmax())
        mass = mass[inside]
    return length / alarmed if alarmed > 0 else inf


def _probabilities(values: ArrayLike, name: str) -> Array:
    p = np.asarray(values, dtype=np.float64)
    if p.ndim not in (1, 2) or p.shape[-1] < 2:
        raise ValueError(f"{name} must have shape (K,) or (N, K) with at least 2 classes, got {p.shape}")
    if not ((p > 0).all() and np.allclose(p.sum(axis=-1), 1.0, atol=1e-6)):
        raise ValueError(f"{name} must hold probabilities above 0 that sum to 1; counts can be turned into such by smoothed()")
    return p
