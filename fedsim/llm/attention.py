"""The attention function through which a live model is steered: query heads that were chosen read their own key-value head.

transformers looks attention up by name and masks by the same name. While a model is :func:`steered` its name points to a function
that gathers, for each query head that runs, its keys and values, and then calls the implementation the model had.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "fedsim_"
BASES = ("sdpa", "eager")

_read: "WeakKeyDictionary[nn.Module, Tensor]" = WeakKeyDictionary()  # attention module -> key-value head of each query head that runs


@contextmanager
def steered(model: nn.Module) -> Iterator[None]:
    """Within, :func:`read_by` says which key-value heads an attention module of ``model`` reads.

    Raises ``ValueError`` for an attention implementation other than sdpa and eager.
    """
    config: Any = model.config
    before = config._attn_implementation
    if before.startswith(PREFIX):
        yield
        return
    if before not in BASES:
        raise ValueError(f"attention must be one of {', '.join(BASES)}, got {before!r}; set model.config._attn_implementation")
    config._attn_implementation = PREFIX + before
    try:
        yield
    finally:
        config._attn_implementation = before


def read_by(attention: nn.Module, heads: Tensor | None) -> None:
    """From now on query head i of ``attention`` reads key-value head ``heads[i]``; ``None``: as the model does by itself."""
    if heads is None:
        _read.pop(attention, None)
    else:
        _read[attention] = heads


def _function(base: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        heads = _read.get(module)
        if heads is not None:
            key, value = key.index_select(1, heads), value.index_select(1, heads)
        result: tuple[Tensor, Tensor | None] = _implementation(base, module)(module, query, key, value, attention_mask, **kwargs)
        return result

    return attend


def _implementation(base: str, module: nn.Module) -> Callable[..., Any]:
    own = sys.modules[type(module).__module__]  # eager attention is written out beside each architecture
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(base, own.eager_attention_forward)
    return found


for _base in BASES:
    AttentionInterface.register(PREFIX + _base, _function(_base))
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])
