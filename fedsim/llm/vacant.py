"""Attention and MLPs that lost all their structures: what is left of them is the bias of their last projection."""

from typing import Any

import torch
from torch import Tensor, nn


class _Vacant(nn.Module):
    """Keeps the parameters of ``module`` under their names, and computes only ``output``'s bias."""

    output: str

    def __init__(self, module: nn.Module):
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)

    def _constant(self, hidden: Tensor) -> Tensor:
        bias = self.get_submodule(self.output).bias
        return bias.expand_as(hidden) if isinstance(bias, Tensor) else torch.zeros_like(hidden)


class VacantAttention(_Vacant):
    """No heads: nothing attends, and each token leaves keys and values of no head in the cache, so that its length stays right."""

    def __init__(self, attention: nn.Module, output: str):
        super().__init__(attention)
        self.output = output
        self.layer_idx, self.head_dim = int(attention.layer_idx), int(attention.head_dim)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, L, D) to (B, L, D)."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is None and args and hasattr(args[0], "update"):
            cache = args[0]
        if cache is not None:
            nothing = hidden_states.new_empty(len(hidden_states), 0, hidden_states.shape[1], self.head_dim)
            cache.update(nothing, nothing, self.layer_idx)
        return self._constant(hidden_states), None


class VacantMLP(_Vacant):
    """No channels."""

    def __init__(self, mlp: nn.Module, output: str):
        super().__init__(mlp)
        self.output = output

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self._constant(hidden_states)
