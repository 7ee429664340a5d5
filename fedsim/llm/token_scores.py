"""How much the output of attention changes when one cached token is pruned: scores that say which tokens a cache can spare.

After arXiv:2510.07651 (OBCache), which follows Optimal Brain Damage. A query attends with weights a = softmax(z) over the tokens, z
its logits, and its output is o = sum_t a_t v_t. Pruning the value, the key or both of token t moves o by a closed form; evicting the token,
which renormalises the softmax, by a / (1 - a) * (o - v_t) exactly. Scores are sums of the squared moves over the window's queries, all query
heads that read the token among them.

Evict alone ignores what attention ignores: one vector added to every key, or to every value. Attention and the norm of values are the
rules that earlier methods rank by.
"""

# B batch, H query heads, G key-value heads, R = H / G, W queries of the window, N = R x (a block of W), T tokens, D features of a head

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

QUERIES_AT_ONCE = 64  # bounds memory: weights of all tokens for this many queries of each head


def token_scores(score: "TokenScore", queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """What ``score`` says about each token, (B, G, T), not negative, in float32 or better: the sum over ``queries`` (B, H, W, D).

    ``keys`` and ``values`` are (B, G, T, D), logits ``scale`` times the products. ``mask`` (B, 1 or H, W, T) is true where a query may attend;
    without it the queries are those of the last W tokens, causal. A query that may attend nowhere counts nothing. ``ValueError`` for
    shapes that do not fit.
    """
    _check(queries, keys, values, mask)
    total = keys.new_zeros(keys.shape[:3], dtype=torch.promote_types(keys.dtype, torch.float32))
    for attended in attention_blocks(queries, keys, values, scale, mask):
        total[..., : attended.values.shape[2]] += score.of(attended).sum(2)
    return total


@dataclass(frozen=True, eq=False)
class Attended:
    """A block of queries: ``logits`` (B, G, N, T), which of them are ``seen`` (broadcasts), and ``values`` (B, G, T, D).

    T ends with the last token that any query of the block may attend to, where that is known.
    """

    logits: Tensor
    seen: Tensor
    values: Tensor

    @cached_property
    def weights(self) -> Tensor:
        """Attention a (B, G, N, T)."""
        return _softmax(self.logits.masked_fill(~self.seen, -torch.inf))

    @cached_property
    def outputs(self) -> Tensor:
        """Outputs o (B, G, N, D)."""
        return self.weights @ self.values

    @cached_property
    def energies(self) -> Tensor:
        """||v||^2 (B, G, 1, T)."""
        return self.values.square().sum(-1).unsqueeze(2)

    @cached_property
    def products(self) -> Tensor:
        """<o, v> (B, G, N, T)."""
        return self.outputs @ self.values.mT

    @cached_property
    def centred(self) -> Tensor:
        """Values (B, G, T, D) about their mean: their differences are the same, and cancel less in float32."""
        return self.values - self.values.mean(2, keepdim=True)

    @cached_property
    def distances(self) -> Tensor:
        """||v - o||^2 (B, G, N, T)."""
        outputs = self.weights @ self.centred
        energies = self.centred.square().sum(-1).unsqueeze(2) + outputs.square().sum(-1, keepdim=True)
        return (energies - 2 * outputs @ self.centred.mT).clamp(min=0)


class TokenScore(Protocol):
    def of(self, block: Attended) -> Tensor:
        """Scores that broadcast to (B, G, N, T), not negative; the sum over N is a token's score."""
        ...


@dataclass(frozen=True)
class Attention:
    """a: what H2O, TOVA and SnapKV rank by."""

    def of(self, block: Attended) -> Tensor:
        return block.weights


@dataclass(frozen=True)
class AttentionTimesValueNorm:
    """a ||v||_1 (VATP, arXiv:2406.12335)."""

    def of(self, block: Attended) -> Tensor:
        return block.weights * block.values.abs().sum(-1).unsqueeze(2)


@dataclass(frozen=True)
class Value:
    """a^2 ||v||^2: the value becomes 0, the weights stay. Exact for that removal."""

    def of(self, block: Attended) -> Tensor:
        return block.weights.square() * block.energies


@dataclass(frozen=True)
class Key:
    """(a z)^2 ||v - o||^2: the key shrinks to 0, to first order in its shrinkage."""

    def of(self, block: Attended) -> Tensor:
        return (block.weights * block.logits).square() * block.distances


@dataclass(frozen=True)
class Joint:
    """||a v + a z (v - o)||^2: key and value shrink together, to first order. ``cross=False`` leaves out the product of the two moves."""

    cross: bool = True

    def of(self, block: Attended) -> Tensor:
        alone = Value().of(block) + Key().of(block)
        if not self.cross:
            return alone
        both = 2 * block.weights.square() * block.logits * (block.energies - block.products)
        return (alone + both).clamp(min=0)


@dataclass(frozen=True)
class Evict:
    """(a / (1 - a))^2 ||v - o||^2: the token leaves and the softmax is renormalised. Exact for the eviction of any one token.

    Where one token takes nearly all attention both factors are lost to rounding, so the token a query attends to most is scored by what
    remains without it: a^2 ||v - o'||^2. A query that sees one token alone has no output to compare with and counts nothing.
    """

    def of(self, block: Attended) -> Tensor:
        a = block.weights
        top = a.argmax(-1, keepdim=True)
        removed = (a / (1 - a).clamp(min=1e-12)).square() * block.distances
        return removed.scatter(-1, top, self._largest(block, a.gather(-1, top), top))

    def _largest(self, block: Attended, a: Tensor, top: Tensor) -> Tensor:
        """(B, G, N, 1)."""
        others = _softmax(block.logits.masked_fill(~block.seen, -torch.inf).scatter(-1, top, -torch.inf))
        own = block.centred.gather(2, top.expand(-1, -1, -1, block.values.shape[-1]))
        moved = a.square() * (own - others @ block.centred).square().sum(-1, keepdim=True)
        return torch.where(others.any(-1, keepdim=True), moved, 0)


@dataclass(frozen=True)
class RandomScore:
    """Tokens at random, a function of ``seed`` and the shape alone; the rule that any other should beat."""

    seed: int = 0

    def of(self, block: Attended) -> Tensor:
        shape = (*block.values.shape[:2], 1, block.values.shape[2])
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed), dtype=block.values.dtype).to(block.values.device)


def eviction_error(queries: Tensor, keys: Tensor, values: Tensor, scale: float, kept: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far the outputs for ``queries`` move when only ``kept`` (B, G, T) tokens stay, relative to the outputs: a scalar, exact.

    The root of the sum of ||o' - o||^2 over that of ||o||^2, of all rows, heads and queries; other arguments as for :func:`token_scores`.
    """
    _check(queries, keys, values, mask)
    moved = whole = keys.new_zeros((), dtype=torch.promote_types(keys.dtype, torch.float32))
    for attended in attention_blocks(queries, keys, values, scale, mask):
        left = replace(attended, seen=attended.seen & kept[..., : attended.values.shape[2]].unsqueeze(2))
        moved = moved + (left.outputs - attended.outputs).square().sum()
        whole = whole + attended.outputs.square().sum()
    return (moved / whole).sqrt()


def attention_blocks(queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Iterator[Attended]:
    """The window cut into blocks of queries; arguments as for :func:`token_scores`."""
    B, G, T, D = keys.shape
    W, R = queries.shape[2], queries.shape[1] // G
    wide = torch.promote_types(keys.dtype, torch.float32)
    keys, values = keys.to(wide), values.to(wide)
    position = torch.arange(T, device=keys.device)
    for low in range(0, W, QUERIES_AT_ONCE):
        block = queries[:, :, low : low + QUERIES_AT_ONCE].to(wide)
        many = block.shape[2]
        if mask is None:
            reach = T - W + low + many
            seen = (position[:reach] <= position[reach - many : reach, None]).repeat(R, 1)
        else:
            reach = T
            seen = mask[:, :, low : low + many].expand(B, G * R, many, T).reshape(B, G, R * many, T)
        logits = scale * block.reshape(B, G, R * many, D) @ keys[:, :, :reach].mT
        yield Attended(logits, seen, values[:, :, :reach])


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis; 0 where all logits are minus infinity."""
    return torch.where(logits.amax(-1, keepdim=True) == -torch.inf, 0, torch.softmax(logits, -1))


def _check(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    shapes = f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
    if queries.ndim != 4 or keys.ndim != 4 or keys.shape != values.shape or queries.shape[0] != keys.shape[0]:
        raise ValueError(f"queries must be (B, H, W, D), keys and values (B, G, T, D), got {shapes}")
    if queries.shape[3] != keys.shape[3] or queries.shape[1] % max(keys.shape[1], 1):
        raise ValueError(f"every key-value head must serve equally many query heads of its size, got {shapes}")
    W, T = queries.shape[2], keys.shape[2]
    if mask is None and W > T:
        raise ValueError(f"without a mask the queries are those of the last tokens, but there are {W} queries and {T} tokens")
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[2:] != (W, T)):
        raise ValueError(f"mask must be (B, 1 or H, {W}, {T}) and boolean, got {tuple(mask.shape)} of {mask.dtype}")
