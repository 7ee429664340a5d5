"""OBCache: a key-value cache of bounded size, from which the tokens leave whose eviction changes the output of attention least.

After arXiv:2510.07651. A *score* says what a token is worth (:mod:`fedsim.llm.token_scores`), a *host* which queries ask and which tokens
stay anyway (:mod:`fedsim.llm.eviction`). Each layer is cut down as soon as its attention has read the whole cache, so a pass is as exact as
what the cache held when it began. Heads are read from tensors, so pruned models with unequal layers work.
"""

# B batch, H query heads, G key-value heads, q queries of a pass, T tokens held, D features of a head

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from fedsim.errors import FedsimError
from fedsim.llm.attention import Function, heads_read, observed
from fedsim.llm.evicted_cache import EvictedLayer, RaggedLayer
from fedsim.llm.eviction import Host, SnapKV, largest, ranked, shared_largest
from fedsim.llm.families import family_of
from fedsim.llm.pruned_model import VacantLayer
from fedsim.llm.token_scores import QUERIES_AT_ONCE, Evict, TokenScore, eviction_error, token_scores


@dataclass(frozen=True, kw_only=True)
class OBCache:
    """After a pass of several tokens every head keeps ``budget`` of them, or ``ratio`` of those seen by the longest row.

    The first ``sink`` tokens of each text stay, and the host's recent ones; a ``ratio`` that leaves no room beside them counts as one token
    more than they are. ``decode=True`` evicts after each token written too; without it the cache grows from the budget as
    tokens are written. With a ``stride`` above 1 it evicts once ``stride`` tokens were written beyond the budget, which costs that much less time
    and holds up to ``stride - 1`` tokens more. Raises ``ValueError`` for fields out of range.
    """

    score: TokenScore = field(default_factory=Evict)
    host: Host = field(default_factory=SnapKV)
    budget: int | None = None
    ratio: float | None = None
    sink: int = 4
    decode: bool = False
    stride: int = 1

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.ratio is None):
            raise ValueError(f"exactly one of budget and ratio must be given, got budget={self.budget!r} and ratio={self.ratio!r}")
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride must be a whole number of tokens, at least 1, got {self.stride!r}")
        for name, value in (("sink", self.sink), ("budget", self.budget)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be a whole number of tokens, got {value!r}")
        if self.budget is not None and self.budget < self._least:
            raise ValueError(
                f"budget must be at least {self._least}, got {self.budget}: {self.sink} of the sink, {self.host.recent} recent ones and one more"
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio!r}")
        if self.decode and not self.host.decodes:
            raise ValueError(f"{self.host!r} evicts after prompts alone; with decode=True take H2O(window=...), TOVA() or StreamingLLM()")

    @contextmanager
    def applied(self, model: nn.Module) -> "Iterator[CacheSession]":
        """Caches that ``model`` fills inside the block are held to the budget; weights, methods and configuration are left as they were.

        A cache can be used on after the block, where it only grows; one of ``AdaKV`` needs a session. Raises ``ValueError`` for an
        unsupported architecture or attention, and at the pass for padding other than at the left or a cache that is static or
        quantised, ``RuntimeError`` where the model has a session already, ``FedsimError`` for keys or values that are not finite. Layers with a sliding window are left alone.
        """
        family = family_of(model)
        attentions = [layer.get_submodule(family.attention) for layer in model.get_submodule(family.layers).children()]
        session = CacheSession(self, len(attentions))
        with observed(model, attentions, session):
            yield session

    def tokens(self, seen: int) -> int:
        """Tokens that each head may hold of ``seen``."""
        if self.budget is not None:
            return self.budget
        assert self.ratio is not None
        return max(ceil(self.ratio * seen), self._least)

    @property
    def _least(self) -> int:
        return self.sink + self.host.recent + 1


class CacheSession:
    """What the caches of one model hold while :class:`OBCache` is applied, and what the evictions cost.

    Bytes are those of keys and values of all caches alive; ``peak_bytes`` is the most they were, at the moment before a layer is cut
    down. Positions and running sums, 4 to 12 bytes for each token and head, are not among them.
    """

    def __init__(self, method: OBCache, layers: int):
        self.method, self._layers = method, layers
        self.peak_bytes = 0
        self._caches: WeakSet[Cache] = WeakSet()
        self._latest: ref[Cache] | None = None
        self._errors: dict[int, Tensor] = {}
        self._window: _Window | None = None
        self._ragged: RaggedLayer | None = None
        self._held_before = 0

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values now."""
        found: list[Any] = [layer for cache in self._caches for layer in cache.layers]
        tensors = [t for layer in found for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def tokens_held(self) -> tuple[int, ...]:
        """Tokens that a head of each layer of the latest cache holds; on average, where heads share a budget."""
        cache = None if self._latest is None else self._latest()
        return () if cache is None else tuple(_held(layer) for layer in cache.layers)

    @property
    def output_error(self) -> tuple[float, ...]:
        """By layer, how far its latest eviction moves the outputs for the queries that decided, at most 64; 0 if it evicted nothing.

        ||o' - o|| / ||o|| of the whole set of tokens that left, exact. Later queries may be moved more or less.
        """
        return tuple(float(self._errors.get(number, 0.0)) for number in range(self._layers))

    def before(self, module: nn.Module, cache: Cache | None) -> None:
        layer = _layer(module, cache)
        self._window, self._ragged, self._held_before = None, None, 0
        if layer is None or layer.keys is None:
            return
        self._held_before = _held(layer)
        if (
            isinstance(layer, EvictedLayer)
            and layer.keys.shape[1]
            and isinstance(layer, RaggedLayer) != (self.method.host.floor is not None)
        ):
            raise ValueError(
                f"this cache was cut down by a host whose heads hold other numbers of tokens than those of {self.method.host!r}"
            )
        if isinstance(layer, RaggedLayer):
            layer.expect()
            self._ragged = layer

    def attend(
        self, own: Function, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        scale = settings.get("scaling") or query.shape[-1] ** -0.5
        heads = heads_read(module)
        if self._ragged is not None:
            if heads is not None:
                raise ValueError(
                    f"{self.method.host!r} needs every query head of a group; do not combine it with a pruning of single query heads"
                )
            self._window = _Window(query, self._ragged.visible(query.shape[1], query.shape[2]), scale)
            return self._ragged.attention(query, scale, settings.get("dropout", 0.0)), None
        self._window = _Window(query, _boolean(attention_mask), scale, heads)
        return own(module, query, key, value, attention_mask, **settings)

    def after(self, module: nn.Module, cache: Cache | None) -> None:
        layer, window = _layer(module, cache), self._window
        self._window = self._ragged = None
        if cache is None or layer is None:
            return
        self._caches.add(cache)
        self._latest = ref(cache)
        with torch.no_grad():
            self._bound(cache, int(module.layer_idx), layer, window)  # type: ignore[arg-type]

    def _bound(self, cache: Cache, number: int, layer: DynamicLayer, window: "_Window | None") -> None:
        """Cut layer ``number`` down to its budget; without a ``window`` it has no heads."""
        scores = None
        if self.method.host.accumulates and window is not None:
            layer = cache.layers[number] = _evicted(layer)
            scores = self._scores(layer, window)
            layer.scores = scores = scores if layer.scores is None else layer.scores + scores
        seen = layer.seen if isinstance(layer, EvictedLayer) else _held(layer)
        budget = self.method.tokens(seen)
        several, over = _held(layer) - self._held_before > 1, _held(layer) - budget
        full = over > 0 if several else self.method.decode and over >= self.method.stride
        if full or number == len(cache.layers) - 1:
            self.peak_bytes = max(self.peak_bytes, self.bytes_held)
        if full and window is None:
            assert layer.keys is not None
            cache.layers[number] = layer = _evicted(layer)
            layer.keep(torch.arange(budget, device=layer.keys.device).expand(*layer.keys.shape[:2], -1))
        elif full and window is not None:
            cache.layers[number] = self._cut(layer, number, window, self._scores(layer, window) if scores is None else scores, budget)

    def _cut(self, layer: DynamicLayer, number: int, window: "_Window", scores: Tensor, budget: int) -> EvictedLayer:
        if not bool(scores.isfinite().all()):
            raise FedsimError(f"keys or values of layer {number} are not finite; no token can be told from another")
        host, sink = self.method.host, self.method.sink
        if isinstance(layer, RaggedLayer):
            worth = ranked(layer.on_tokens(scores, 0.0), host, sink, layer.first[:, 0, 0])
            held = layer.on_tokens(torch.ones_like(scores), 0.0).bool()
            assert host.floor is not None
            kept = shared_largest(worth.masked_fill(~held, -torch.inf), budget, host.floor)
            self._errors[number] = self._error(layer, window, layer.on_slots(kept))
            layer.keep_tokens(kept)
            return layer
        pads = _pads(window.mask, scores)
        worth = ranked(scores, host, sink, pads)
        if host.floor is not None:
            kept = shared_largest(worth, budget, host.floor)
            self._errors[number] = self._error(layer, window, kept)
            return RaggedLayer(layer, kept, pads)
        places = largest(worth, budget)
        self._errors[number] = self._error(layer, window, torch.zeros_like(scores, dtype=torch.bool).scatter(-1, places, True))
        layer = _evicted(layer)
        layer.keep(places)
        return layer

    def _scores(self, layer: Any, window: "_Window") -> Tensor:
        keys, values, many = layer.keys, layer.values, self.method.host.window
        if many == 0:
            return torch.zeros(keys.shape[:3], device=keys.device)
        if many is not None:
            window = window.last(many)
        if window.heads is None:
            return token_scores(self.method.score, window.queries, keys, values, window.scale, window.mask)
        own = token_scores(self.method.score, window.queries, keys[:, window.heads], values[:, window.heads], window.scale, window.mask)
        return own.new_zeros(keys.shape[:3]).index_add(1, window.heads, own)

    def _error(self, layer: Any, window: "_Window", kept: Tensor) -> Tensor:
        window = window.last(min(self.method.host.window or QUERIES_AT_ONCE, QUERIES_AT_ONCE))
        keys, values = layer.keys, layer.values
        if window.heads is not None:
            keys, values, kept = keys[:, window.heads], values[:, window.heads], kept[:, window.heads]
        return eviction_error(window.queries, keys, values, window.scale, kept, window.mask)


class _Window(NamedTuple):
    """What attention saw: ``queries`` (B, H, q, D), a boolean mask (B, 1 or H, q, T) or ``None`` for a causal one, the scale of logits, and
    the key-value head (H,) of each query head where they are not equally many."""

    queries: Tensor
    mask: Tensor | None
    scale: float
    heads: Tensor | None = None

    def last(self, many: int) -> "_Window":
        return self._replace(queries=self.queries[:, :, -many:], mask=None if self.mask is None else self.mask[:, :, -many:])


def _layer(module: nn.Module, cache: Cache | None) -> DynamicLayer | None:
    """The layer of ``cache`` that ``module`` fills, if tokens may leave it; ``ValueError`` where they cannot."""
    number = int(module.layer_idx)  # type: ignore[arg-type]
    if cache is None or number >= len(cache.layers) or getattr(cache.layers[number], "is_sliding", False):
        return None
    layer = cache.layers[number]
    if type(layer) not in (DynamicLayer, VacantLayer, EvictedLayer, RaggedLayer):
        raise ValueError(f"tokens can be evicted from a DynamicCache, not from a layer of kind {type(layer).__name__}")
    return layer  # type: ignore[return-value]


def _evicted(layer: DynamicLayer) -> EvictedLayer:
    return layer if isinstance(layer, EvictedLayer) else EvictedLayer(layer)


def _held(layer: Any) -> int:
    return int(layer.held if isinstance(layer, EvictedLayer) else 0 if layer.keys is None else layer.keys.shape[-2])


def _boolean(mask: Tensor | None) -> Tensor | None:
    """A mask that is true where a query may attend; eager attention adds 0 there."""
    return mask if mask is None or mask.dtype == torch.bool else mask == 0


def _pads(mask: Tensor | None, scores: Tensor) -> Tensor:
    """Padding (B,) at the left of each row, of ``scores`` (B, G, T); ``ValueError`` for padding elsewhere."""
    if mask is None:
        return torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    real = mask[:, 0, -1].expand(len(scores), -1)
    if bool((real[:, 1:] < real[:, :-1]).any()):
        raise ValueError("a batch must be padded at the left: the attention mask of some row ends or breaks off before its last token")
    return (~real).sum(-1)
