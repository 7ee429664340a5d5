"""Convex hulls: all mixtures of finitely many laws, known by their densities, or by samples and scores alone.

Exports ``MixtureHull``, ``SampledSet`` (the estimated sets of arXiv:2407.11094), ``ObservedLaw`` and ``PosteriorMixture``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from detection.expectations import DRAWS, Nodes, nodes_of, on_the_line
from detection.laws import Array, ByValue, Law, NormalisedLaw, ScoredLaw, read_only
from detection.mixtures import KernelDensity, Mixture

Posterior = Callable[[Array], Array]


class Hull(Protocol):
    """All mixtures of the components ``laws``."""

    @property
    def laws(self) -> Sequence[Law]:
        """Components, by their scores."""
        ...

    def log_odds(self, x: Array) -> Array:
        """Logarithm of each component's density at ``x``, (n, K), up to one number for each observation."""
        ...

    def pooled(self, rng: np.random.Generator | None, num: int) -> Nodes:
        """Nodes for expectations under the equal mixture."""
        ...

    def member(self, weights: Sequence[float]) -> Law:
        """The mixture of the given weights."""
        ...


@dataclass(frozen=True)
class MixtureHull:
    """All mixtures of ``laws``, normalised and of one dimension. What is linear in the law is extreme at one of them.

    Raises ``ValueError`` for no law, and for a law without a density: mixing needs densities (or, in :class:`SampledSet`, posteriors).
    """

    laws: tuple[NormalisedLaw, ...]

    def __post_init__(self) -> None:
        laws = tuple(self.laws)
        if not laws:
            raise ValueError("laws must hold at least one law, got none")
        object.__setattr__(self, "laws", laws)
        if len(laws) > 1:
            Mixture(laws, _equal(len(laws)))

    def extreme(self) -> tuple[Law, ...]:
        """The laws themselves."""
        return self.laws

    def centre(self) -> Law:
        """The equal mixture."""
        return self.member(_equal(len(self.laws)))

    def member(self, weights: Sequence[float]) -> Law:
        """The mixture of the given weights; a law itself where it has all the weight."""
        return _sole(self.laws, weights) or Mixture(*_positive(self.laws, weights))

    def log_odds(self, x: Array) -> Array:
        """Log-densities (n, K)."""
        if len(self.laws) == 1:
            return np.zeros((len(x), 1))
        return np.stack([law.log_density(x) for law in self.laws], axis=-1)

    def pooled(self, rng: np.random.Generator | None = None, num: int = DRAWS) -> Nodes:
        """Quadrature for numbers, else ``num`` draws in equal shares."""
        if all(on_the_line(law) for law in self.laws):
            return nodes_of(self.centre())
        return Nodes.of_draws(np.concatenate([nodes_of(law, rng=rng, num=max(num // len(self.laws), 100)).points for law in self.laws]))


@dataclass(frozen=True, eq=False)
class ObservedLaw(ByValue):
    """``law`` gives the score, and ``draws`` (n,) or (n, d) stand for it in every expectation: no other draws from it are to be had.

    ``sample`` picks among the draws with replacement.
    """

    law: Law
    draws: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws", checked_draws(self.draws, "draws"))

    def __repr__(self) -> str:
        return f"ObservedLaw(law={_short(self.law)}, {len(self.draws)} draws)"

    def score(self, x: ArrayLike) -> Array:
        """Score of ``law``."""
        return self.law.score(np.asarray(x, dtype=np.float64))

    def laplacian(self, x: ArrayLike) -> Array:
        """Laplacian of ``law``."""
        return self.law.laplacian(np.asarray(x, dtype=np.float64))

    def hyvarinen(self, x: ArrayLike) -> Array:
        """Hyvarinen score of ``law``."""
        return self.law.hyvarinen(np.asarray(x, dtype=np.float64))

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``num`` of the draws, with replacement."""
        chosen: Array = self.draws[rng.integers(len(self.draws), size=num)]
        return chosen


@dataclass(frozen=True, eq=False)
class SampledSet:
    """All mixtures of K laws known by ``samples`` (n_k,) or (n_k, d), one of each: an uncertainty set estimated from data.

    ``laws`` are their scores, given or learned from *other* data; without them, a kernel density is fitted to a third of each sample.
    Mixing needs ``posterior``: ``(n, d) -> (n, K)`` probabilities of the components at equal prior weights, such as those of a calibrated
    classifier; without it, the laws' densities. Half of what remains places the least favourable mixture, and the other half, never seen
    before, verifies it and the multiplier. Raises ``ValueError`` for fewer than 100 observations of a law, or where mixing is impossible.
    """

    samples: tuple[Array, ...]
    laws: tuple[Law, ...] = ()
    posterior: Posterior | None = None
    design: tuple[Array, ...] = field(init=False, repr=False)
    check: tuple[Array, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        samples = tuple(checked_draws(sample, f"samples[{k}]") for k, sample in enumerate(self.samples))
        if not samples or len({sample.shape[1:] for sample in samples}) > 1:
            raise ValueError(f"samples must be arrays (n,) or (n, d) of one dimension, at least one, got {[s.shape for s in samples]}")
        laws, rest = tuple(self.laws), samples
        if not laws:
            laws = tuple(KernelDensity(sample[::3]) for sample in samples)
            rest = tuple(np.delete(sample, np.s_[::3], axis=0) for sample in samples)
        if len(laws) != len(samples):
            raise ValueError(f"laws must hold the score of each of the {len(samples)} samples, got {len(laws)}")
        lacking = [law for law in laws if not isinstance(law, NormalisedLaw)]
        if len(laws) > 1 and self.posterior is None and lacking:
            raise ValueError(
                f"mixing needs posterior probabilities or densities; pass posterior, for {_short(lacking[0])} has no log_density"
            )
        for name, value in (("samples", samples), ("laws", laws)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "design", tuple(part[::2] for part in rest))
        object.__setattr__(self, "check", tuple(part[1::2] for part in rest))

    def extreme(self) -> tuple[Law, ...]:
        """The components, each with the observations that no design has seen."""
        return tuple(ObservedLaw(law, draws) for law, draws in zip(self.laws, self.check, strict=True))

    def centre(self) -> Law:
        """The equal mixture, with as many unseen observations of each component."""
        least = min(map(len, self.check))
        return ObservedLaw(self.member(_equal(len(self.laws))), np.concatenate([draws[:least] for draws in self.check]))

    def member(self, weights: Sequence[float]) -> Law:
        """The mixture of the given weights; a component itself where it has all the weight."""
        alone = _sole(self.laws, weights)
        if alone is not None:
            return alone
        if self.posterior is None:
            return Mixture(*_positive(self.laws, weights))  # type: ignore[arg-type]
        return PosteriorMixture(laws=self.laws, weights=tuple(map(float, weights)), posterior=self.posterior)

    def log_odds(self, x: Array) -> Array:
        """Logarithms of the posterior probabilities, or log-densities, (n, K)."""
        if len(self.laws) == 1:
            return np.zeros((len(x), 1))
        if self.posterior is not None:
            return log_posterior(self.posterior, x, len(self.laws))
        return np.stack([law.log_density(x) for law in self.laws], axis=-1)  # type: ignore[attr-defined]

    def pooled(self, rng: np.random.Generator | None = None, num: int = DRAWS) -> Nodes:
        """The design half of every sample, each sample with equal weight."""
        counts = np.array([len(part) for part in self.design])
        return Nodes(np.concatenate(self.design), -np.log(np.repeat(counts, counts) * float(len(counts))), True)


@dataclass(frozen=True, kw_only=True, eq=False)
class PosteriorMixture(ScoredLaw):
    """``sum_k weights_k p_k`` of ``laws`` known by their scores and by ``posterior``, their probabilities given ``x`` at equal weights."""

    laws: tuple[Law, ...]
    weights: tuple[float, ...]
    posterior: Posterior

    @property
    def dimension(self) -> int:
        """As of the laws: 0 for numbers, else ``d``."""
        return int(getattr(self.laws[0], "dimension", 0))

    def responsibilities(self, x: Array) -> Array:
        """Probability of each component given ``x`` at the mixture's own weights, (n, K)."""
        flat = x.reshape(-1, x.shape[-1]) if self.dimension else x.reshape(-1)
        with np.errstate(divide="ignore"):
            parts = log_posterior(self.posterior, flat, len(self.laws)) + np.log(np.asarray(self.weights))
        shares = np.exp(parts - parts.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return np.asarray(shares.reshape(*(x.shape[:-1] if self.dimension else x.shape), len(self.laws)))

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """Draws of the components in the mixture's proportions."""
        counts = rng.multinomial(num, self.weights)
        parts = [law.sample(rng, int(count)) for law, count in zip(self.laws, counts, strict=True) if count]
        return np.asarray(rng.permutation(np.concatenate(parts)))

    def _terms(self, x: Array) -> tuple[Array, Array]:
        shares = self.responsibilities(x)
        score, bend = np.zeros(x.shape), np.zeros(shares.shape[:-1])
        for k, law in enumerate(self.laws):
            if self.weights[k] > 0:
                own, share = law.score(x), shares[..., k]
                score += own * (share[..., None] if self.dimension else share)
                bend += share * (law.laplacian(x) + _square(own, self.dimension))
        return score, bend - _square(score, self.dimension)


def log_posterior(posterior: Posterior, x: Array, num: int) -> Array:
    """Logarithms of ``posterior(x)``, or ``ValueError`` where those are not ``num`` probabilities for each observation."""
    shares = np.asarray(posterior(x), dtype=np.float64)
    if shares.shape != (len(x), num) or not (shares >= 0).all() or np.abs(shares.sum(axis=1) - 1.0).max(initial=0.0) > 1e-6:
        raise ValueError(
            f"posterior must return probabilities of shape ({len(x)}, {num}) with rows that sum to 1, got shape {shares.shape}"
        )
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(shares))


def checked_draws(draws: ArrayLike, name: str) -> Array:
    """``draws`` as a read-only copy. Raises ``ValueError`` unless they are at least 100 finite observations (n,) or (n, d)."""
    draws = np.asarray(draws, dtype=np.float64)
    if draws.ndim not in (1, 2) or len(draws) < 100 or not np.isfinite(draws).all():
        raise ValueError(f"{name} must be at least 100 finite observations (n,) or (n, d), got shape {draws.shape}")
    return read_only(draws)


def _equal(num: int) -> tuple[float, ...]:
    return (1.0 / num,) * num


def _sole(laws: Sequence[Law], weights: Sequence[float]) -> Law | None:
    held = [law for law, weight in zip(laws, weights, strict=True) if weight > 0]
    return held[0] if len(held) == 1 else None


def _positive(laws: Sequence[Any], weights: Sequence[float]) -> tuple[list[Any], list[float]]:
    held = [(law, float(weight)) for law, weight in zip(laws, weights, strict=True) if weight > 0]
    return [law for law, _ in held], [weight for _, weight in held]


def _short(law: Law) -> str:
    return type(law).__name__


def _square(score: Array, dimension: int) -> Array:
    square: Array = score**2
    return square.sum(axis=-1) if dimension else square
