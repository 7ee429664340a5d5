"""Cache layers that hold some of the tokens they have seen, and attention to heads that hold unequally many.

Keys keep the rotation of their own positions. A layer reports the tokens it has *seen* as its length and, as sliding windows do, masks for
those it *holds*, so default positions, causal masks and ``generate`` are right without the caller passing anything.
"""

# B batch, H query heads, G key-value heads, n tokens held, S slots (n G), q new tokens, D features of a head

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class EvictedLayer(DynamicLayer):
    """Keys and values (B, G, n, D), ``positions`` (B, G, n) among the ``seen`` tokens and, where a host adds up, ``scores`` (B, G, n).

    Taken over from ``layer``, of which nothing was evicted. Once something was, only tokens that came later can be cropped; more
    raises ``RuntimeError``.
    """

    is_croppable = False
    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None = None
    carried: tuple[str, ...] = ("keys", "values", "positions", "scores")

    def __init__(self, layer: DynamicLayer):
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._note(layer.keys)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.positions = torch.empty((*key_states.shape[:2], 0), dtype=torch.int32, device=key_states.device)
        self.scores = None
        self.seen = self.seen_at_eviction = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)
        self._note(key_states)
        return self.keys, self.values

    @property
    def held(self) -> int:
        """Tokens held, of each head."""
        return self.keys.shape[-2]

    def keep(self, places: Tensor) -> None:
        """Only the tokens at ``places`` (B, G, n) of those held stay."""
        wide = places.unsqueeze(-1).expand(-1, -1, -1, self.keys.shape[-1])
        self.keys, self.values, self.positions = self.keys.gather(2, wide), self.values.gather(2, wide), self.positions.gather(2, places)
        self.scores = None if self.scores is None else self.scores.gather(2, places)
        self.seen_at_eviction = self.seen

    def get_seq_length(self) -> int:
        return self.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.is_initialized:
            return query_length, 0
        return self.held + query_length, self.seen - self.held

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or not self.is_initialized:
            super().crop(tokens_to_remove)  # type: ignore[no-untyped-call]
            return
        newer = self.seen - self.seen_at_eviction
        if -tokens_to_remove > newer:
            raise RuntimeError(
                f"only the {newer} tokens since the last eviction can be cropped, not {-tokens_to_remove}; raise the budget or crop less"
            )
        left = self.keys.shape[-2] + tokens_to_remove * self._slots
        self.keys, self.values, self.positions = self.keys[:, :, :left], self.values[:, :, :left], self.positions[..., :left]
        self.scores = None if self.scores is None else self.scores[..., :left]
        self.seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda tensor: tensor[indices])

    @property
    def _slots(self) -> int:
        """Places along the third axis that one token takes."""
        return 1

    def _note(self, key_states: Tensor) -> None:
        """Positions and scores of new tokens."""
        new = key_states.shape[-2]
        position = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=self.positions.device)
        self.positions = torch.cat([self.positions, position.expand(*self.positions.shape[:2], new)], -1)
        if self.scores is not None:
            self.scores = F.pad(self.scores, (0, new))
        self.seen += new

    def _rows(self, take: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            for name in self.carried:
                if getattr(self, name) is not None:
                    setattr(self, name, take(getattr(self, name)))


class RaggedLayer(EvictedLayer):
    """Heads that hold unequally many tokens, every row ``n G`` in all: keys and values (B, 1, S, D), ``heads`` and ``positions`` (B, 1, S).

    Made of a dense ``layer`` of which the tokens ``kept`` (B, G, T), equally many in each row, stay; rows begin with ``pads`` (B,) of padding.
    Only attention that knows the slots can read it: :meth:`expect` before each pass, or :meth:`update` raises ``RuntimeError``.
    """

    heads: Tensor
    first: Tensor
    _expected: bool
    carried = (*EvictedLayer.carried, "heads", "first")

    def __init__(self, layer: DynamicLayer, kept: Tensor, pads: Tensor):
        DynamicLayer.__init__(self)  # type: ignore[no-untyped-call]
        assert layer.keys is not None
        assert layer.values is not None
        self.groups, self.first = kept.shape[1], pads[:, None, None]
        self.expect()
        self.update(layer.keys, layer.values)
        self.keep_tokens(kept)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.heads = torch.empty_like(self.positions)

    @property
    def held(self) -> int:
        """Tokens held, of a head on average."""
        return self.keys.shape[-2] // self.groups

    def keep(self, places: Tensor) -> None:
        """Only the slots at ``places`` (B, 1, S) stay."""
        self.heads = self.heads.gather(2, places)
        super().keep(places)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._expected:
            raise RuntimeError("the heads of this cache hold unequally many tokens; go on with it inside OBCache(...).applied(model)")
        self._expected = False
        return super().update(self._laid(key_states), self._laid(value_states))

    def expect(self) -> None:
        """The next update belongs to a pass whose attention knows the slots."""
        self._expected = True

    def reset(self) -> None:
        raise RuntimeError("this cache knows the padding of its text; make a new cache for another")

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.heads = self.heads[..., : self.keys.shape[-2]]

    def visible(self, heads: int, queries: int) -> Tensor:
        """Which slots the newest ``queries`` of each of ``heads`` query heads may attend to, (B, H, q, S)."""
        group = torch.arange(heads, device=self.keys.device) // (heads // self.groups)
        last = torch.arange(self.seen - queries, self.seen, device=self.keys.device)
        own = self.heads == group[:, None]
        return (own & (self.positions >= self.first)).unsqueeze(2) & (self.positions <= last[:, None]).unsqueeze(1)

    def attention(self, queries: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
        """Outputs (B, q, H, D) for ``queries`` (B, H, q, D)."""
        heads, many = queries.shape[1:3]
        keys, values = self.keys.expand(-1, heads, -1, -1), self.values.expand(-1, heads, -1, -1)
        mask = self.visible(heads, many)
        outputs = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale)
        return outputs.transpose(1, 2).contiguous()

    def on_tokens(self, scores: Tensor, absent: float) -> Tensor:
        """Scores (B, 1, S) of slots as scores (B, G, T) of all tokens seen, ``absent`` where none is held."""
        B = len(scores)
        grid = scores.new_full((B, self.groups * self.seen), absent)
        return grid.scatter(1, self._cells, scores[:, 0]).reshape(B, self.groups, self.seen)

    def on_slots(self, kept: Tensor) -> Tensor:
        """Flags (B, G, T) of tokens seen as flags (B, 1, S) of the slots."""
        return kept.reshape(len(kept), -1).gather(1, self._cells).unsqueeze(1)

    def keep_tokens(self, kept: Tensor) -> None:
        """Only the tokens ``kept`` (B, G, T), equally many in each row, stay."""
        self.keep(torch.nonzero(self.on_slots(kept)[:, 0])[:, 1].reshape(len(kept), 1, -1))

    @property
    def _cells(self) -> Tensor:
        """Where each slot lies in a table of heads by tokens seen, (B, S)."""
        return (self.heads.long() * self.seen + self.positions)[:, 0]

    @property
    def _slots(self) -> int:
        return self.groups

    def _laid(self, states: Tensor) -> Tensor:
        """States (B, G, q, D) as slots (B, 1, q G, D), all of a token together so that the newest can be cropped."""
        return states.transpose(1, 2).reshape(len(states), 1, -1, states.shape[-1])

    def _note(self, key_states: Tensor) -> None:
        B, tokens = len(key_states), key_states.shape[-2] // self.groups
        position = torch.arange(self.seen, self.seen + tokens, dtype=torch.int32, device=self.keys.device)
        group = torch.arange(self.groups, dtype=torch.int32, device=self.keys.device)
        self.positions = torch.cat([self.positions, position.repeat_interleave(self.groups).expand(B, 1, -1)], -1)
        self.heads = torch.cat([self.heads, group.repeat(tokens).expand(B, 1, -1)], -1)
        self.seen += tokens
