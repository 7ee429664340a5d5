"""The part of fedsim that travels with a saved model: where things lie in each family, and how layers of unequal sizes are built.

Depends on torch and transformers alone. A saved folder holds a copy of this file; stock transformers reads it with
``trust_remote_code=True``. ``config.per_layer_config`` says how many heads and channels each layer has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Family:
    """Names inside one architecture: ``layers`` from the model, the others from a layer.

    ``fused`` is the one projection that holds queries, keys and values side by side, where they are not apart. ``hidden`` are the
    projections into the MLP, ``mlp`` the module around them where there is one. ``heads``, ``kv_heads`` (``None`` where every head has its
    own) and ``width`` of the MLP are fields of the configuration; ``counted`` are attributes of the attention that hold (heads,
    features of all heads).
    """

    layers: str
    attention: str
    output: str
    hidden: tuple[str, ...]
    down: str
    mlp: str | None
    separate: tuple[str, str, str] | None = ("q_proj", "k_proj", "v_proj")
    fused: str | None = None
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    width: str = "intermediate_size"
    counted: tuple[str | None, str | None] = (None, None)


_LLAMA = Family("model.layers", "self_attn", "o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp")
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": Family(
        *("model.decoder.layers", "self_attn", "out_proj", ("fc1",), "fc2", None),
        kv_heads=None,
        width="ffn_dim",
        counted=("num_heads", None),
    ),
    "gpt2": Family(
        *("transformer.h", "attn", "c_proj", ("mlp.c_fc",), "mlp.c_proj", "mlp"),
        separate=None,
        fused="c_attn",
        heads="n_head",
        kv_heads=None,
        width="n_inner",
        counted=("num_heads", "split_size"),
    ),
}


def shrink(model: nn.Module) -> None:
    """Give every layer of a newly built ``model`` the sizes of its ``config.per_layer_config``."""
    config: Any = model.config
    family = FAMILIES[config.model_type]
    for layer, sizes in zip(model.get_submodule(family.layers).children(), config.per_layer_config, strict=True):
        attention = layer.get_submodule(family.attention)
        heads, d = int(getattr(sizes, family.heads)), int(attention.head_dim)  # type: ignore[arg-type]
        groups = heads if family.kv_heads is None else int(getattr(sizes, family.kv_heads))
        if family.fused:
            _resize(attention, family.fused, outputs=3 * heads * d)
        for name, number in zip(family.separate or (), (heads, groups, groups), strict=bool(family.separate)):
            _resize(attention, name, outputs=number * d)
        _resize(attention, family.output, inputs=heads * d)
        for counter, value in zip(family.counted, (heads, heads * d), strict=True):
            if counter is not None:
                setattr(attention, counter, value)
        width = int(getattr(sizes, family.width))
        for name in family.hidden:
            _resize(layer, name, outputs=width)
        _resize(layer, family.down, inputs=width)
        if not heads:
            layer.set_submodule(family.attention, VacantAttention(attention, family.output))
        if not width and family.mlp is not None:
            layer.set_submodule(family.mlp, VacantMLP(layer.get_submodule(family.mlp), family.down.rpartition(".")[2]))


def _resize(parent: nn.Module, name: str, inputs: int | None = None, outputs: int | None = None) -> None:
    """Give a projection empty weights of other sizes."""
    projection: Any = parent.get_submodule(name)
    transposed = isinstance(projection, Conv1D)
    features = {"nx": inputs, "nf": outputs} if transposed else {"in_features": inputs, "out_features": outputs}
    for attribute, number in features.items():
        if number is not None:
            setattr(projection, attribute, number)
    shape = [getattr(projection, attribute) for attribute in features]
    projection.weight = nn.Parameter(projection.weight.new_empty(shape if transposed else shape[::-1]))
    if outputs is not None and projection.bias is not None:
        projection.bias = nn.Parameter(projection.bias.new_empty(outputs))


class _Vacant(nn.Module):
    """What is left of a ``module`` that lost all its structures: its parameters under their names, and the bias of its last projection."""

    output: str

    def __init__(self, module: nn.Module, output: str):
        super().__init__()
        self.output = output
        for name, child in module.named_children():
            self.add_module(name, child)

    def _constant(self, hidden: Tensor) -> Tensor:
        bias = self.get_submodule(self.output).bias
        return bias.expand_as(hidden) if isinstance(bias, Tensor) else torch.zeros_like(hidden)


class VacantLayer(DynamicLayer):
    """Cache of a layer without heads. It says how many tokens it holds; transformers takes it for empty, and positions from the first layer."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2]) if self.keys is not None and self.keys.ndim == 4 else 0


class VacantAttention(_Vacant):
    """No heads: each token leaves keys and values of no head in the cache, so that its length stays right."""

    def __init__(self, attention: nn.Module, output: str):
        super().__init__(attention, output)
        self.layer_idx, self.head_dim = int(attention.layer_idx), int(attention.head_dim)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, L, D) to (B, L, D)."""
        cache: Any = kwargs.get("cache", kwargs.get("past_key_values", args[0] if args else None))
        if hasattr(cache, "update"):
            nothing = hidden_states.new_empty(len(hidden_states), 0, hidden_states.shape[1], self.head_dim)
            cache.update(nothing, nothing, self.layer_idx)
            if type(cache.layers[self.layer_idx]) is DynamicLayer:
                cache.layers[self.layer_idx] = VacantLayer(cache.layers[self.layer_idx])
        return self._constant(hidden_states), None


class VacantMLP(_Vacant):
    """No channels."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self._constant(hidden_states)


class PrunedLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any):
        super().__init__(config)
        shrink(self)


class PrunedMistral(MistralForCausalLM):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any):
        super().__init__(config)
        shrink(self)


class PrunedQwen2(Qwen2ForCausalLM):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any):
        super().__init__(config)
        shrink(self)


class PrunedQwen3(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any):
        super().__init__(config)
        shrink(self)


class PrunedOPT(OPTForCausalLM):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any):
        super().__init__(config)
        shrink(self)


class PrunedGPT2(GPT2LMHeadModel):  # type: ignore[no-untyped-call]
    def __init__(self, config: Any):
        super().__init__(config)
        shrink(self)


PRUNED: Mapping[str, Any] = {
    "llama": PrunedLlama,
    "mistral": PrunedMistral,
    "qwen2": PrunedQwen2,
    "qwen3": PrunedQwen3,
    "opt": PrunedOPT,
    "gpt2": PrunedGPT2,
}
