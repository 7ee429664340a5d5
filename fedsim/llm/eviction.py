"""Which cached tokens stay: the mechanics of H2O, TOVA, SnapKV, AdaKV and StreamingLLM, whatever the score.

A host says which queries score the tokens, whether scores add up over passes, which tokens stay anyway, and whether each key-value
head keeps equally many. The first tokens of a text (its *sink*) and the host's ``recent`` newest stay; of the others those with the
largest scores, the newer of two equal ones.
"""

# B batch, G key-value heads, T tokens held, n tokens that stay

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Host(Protocol):
    """``window``: the last queries of a pass that score, ``None`` all of them; ``pool``: width of the maximum over neighbouring scores.

    ``floor``: heads of a layer share one budget, each with at least this fraction of an equal share; ``None``: equal shares.
    ``decodes``: whether the host can evict after each token written.
    """

    @property
    def window(self) -> int | None: ...
    @property
    def recent(self) -> int: ...
    @property
    def pool(self) -> int: ...
    @property
    def floor(self) -> float | None: ...
    @property
    def accumulates(self) -> bool: ...
    @property
    def decodes(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class H2O:
    """Scores add up over all passes and queries, or over the last ``window`` of each (arXiv:2306.14048).

    Terms of past queries stay as they were against the cache of their time; after an eviction they are an estimate.
    The first queries of a text see few tokens, any of which moves their output much: sums over all queries favour the first tokens, and
    ``Evict`` then recalls less than ``Key`` and ``Joint`` (``experiments.studies.obcache_recall``); a ``window`` that leaves them out mends it.
    """

    recent: int = 32
    window: int | None = None
    pool: ClassVar[int] = 1
    floor: ClassVar[None] = None
    accumulates: ClassVar[bool] = True
    decodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_whole("recent", self.recent, 0)
        if self.window is not None:
            _check_whole("window", self.window, 1)


@dataclass(frozen=True)
class TOVA:
    """The last query alone scores, and any token may leave (arXiv:2401.06104)."""

    window: ClassVar[int] = 1
    recent: ClassVar[int] = 0
    pool: ClassVar[int] = 1
    floor: ClassVar[None] = None
    accumulates: ClassVar[bool] = False
    decodes: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """The last ``window`` queries score and their tokens stay; older scores become the maximum of ``pool`` neighbours (arXiv:2404.14469)."""

    window: int = 32
    pool: int = 7
    floor: ClassVar[None] = None
    accumulates: ClassVar[bool] = False
    decodes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_window(self.window, self.pool)

    @property
    def recent(self) -> int:
        return self.window


@dataclass(frozen=True, kw_only=True)
class AdaKV:
    """As :class:`SnapKV`, but the heads of a layer share one budget; each keeps at least ``floor`` of an equal share (arXiv:2407.11550).

    Heads hold unequally many tokens, in slots laid end to end: nothing is stored for padding. Attention to such a layer spends the
    multiplications of every head on all slots.
    """

    floor: float = 0.2
    window: int = 32
    pool: int = 7
    accumulates: ClassVar[bool] = False
    decodes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_window(self.window, self.pool)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor!r}")

    @property
    def recent(self) -> int:
        return self.window


@dataclass(frozen=True)
class StreamingLLM:
    """The sink and the newest tokens; scores do not matter (arXiv:2309.17453)."""

    window: ClassVar[int] = 0
    recent: ClassVar[int] = 0
    pool: ClassVar[int] = 1
    floor: ClassVar[None] = None
    accumulates: ClassVar[bool] = False
    decodes: ClassVar[bool] = True


def ranked(scores: Tensor, host: Host, sink: int, pads: Tensor) -> Tensor:
    """Scores (B, G, T) as they decide: pooled, infinite for tokens that stay, the least finite number for the first ``pads`` (B,) of a row."""
    T = scores.shape[-1]
    old = max(T - host.recent, 0)
    if host.pool > 1 and old:
        pooled = F.max_pool1d(scores[..., :old], host.pool, stride=1, padding=host.pool // 2)
        scores = torch.cat([pooled, scores[..., old:]], -1)
    place = torch.arange(T, device=scores.device)
    text = place - pads[:, None, None]
    return scores.masked_fill((text < sink) | (place >= old), torch.inf).masked_fill(text < 0, torch.finfo(scores.dtype).min)


def largest(scores: Tensor, n: int) -> Tensor:
    """Places (..., n) of the ``n`` largest of ``scores`` (..., T) in ascending order; of equal ones the last.

    >>> largest(torch.tensor([3.0, 1.0, 1.0, 2.0]), 3)
    tensor([0, 2, 3])
    """
    backwards = torch.sort(scores.flip(-1), dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.sort(scores.shape[-1] - 1 - backwards, dim=-1).values


def shared_largest(scores: Tensor, n: int, floor: float) -> Tensor:
    """Flags (B, G, T) of the n G largest of ``scores`` (B, G, T) over all heads, among them ``int(floor * n)`` of each head."""
    B, G, T = scores.shape
    scores = scores.scatter(-1, largest(scores, int(floor * n)), torch.inf)
    places = largest(scores.mT.reshape(B, T * G), n * G)
    return torch.zeros(B, T * G, dtype=torch.bool, device=scores.device).scatter(-1, places, True).reshape(B, T, G).mT


def _check_window(window: int, pool: int) -> None:
    _check_whole("window", window, 1)
    _check_whole("pool", pool, 1)
    if pool % 2 == 0:
        raise ValueError(f"pool must be odd, so that it has a middle, got {pool!r}")


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
