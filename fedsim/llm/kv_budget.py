"""Bytes of a key-value cache, and the tokens a client can afford with so many."""

from torch import Tensor, nn

from fedsim.llm.families import family_of
from fedsim.llm.structures import key_value_heads


def kv_bytes_per_token(model: nn.Module) -> int:
    """Bytes of keys and values that one token takes in all layers, in the type of the weights; heads are counted in the weights.

    Raises ``ValueError`` for an unsupported architecture.
    """
    family = family_of(model)
    total = 0
    for layer in model.get_submodule(family.layers).children():
        attention = layer.get_submodule(family.attention)
        weight = attention.get_submodule(family.output).weight
        assert isinstance(weight, Tensor)
        total += 2 * key_value_heads(attention, family)[1] * int(attention.head_dim) * weight.element_size()  # type: ignore[arg-type]
    return total


def budget_for(num_bytes: int, model: nn.Module, batch: int = 1) -> int:
    """The most tokens each head may hold so that a cache of ``batch`` texts takes no more than ``num_bytes``.

    Raises ``ValueError`` where that is not one token, or no head is left to hold any.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch!r}")
    each = batch * kv_bytes_per_token(model)
    if not each:
        raise ValueError("the model has no key-value heads left, so any number of tokens takes no bytes")
    if num_bytes < each:
        raise ValueError(f"num_bytes must be at least {each}, what one token of {batch} texts takes, got {num_bytes!r}")
    return num_bytes // each
