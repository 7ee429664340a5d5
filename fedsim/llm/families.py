"""Where attention and MLP lie in the decoder layers of each supported family of Hugging Face models."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """Names inside one architecture: ``layers`` from the model, the others from a layer.

    ``fused`` is the one projection that holds queries, keys and values side by side, where they are not apart. ``hidden`` are the
    projections into the MLP, ``mlp`` the module around them where there is one. Field names of the configuration: ``heads``, ``kv_heads``
    (``None`` where every head has its own), ``width`` of the MLP. ``counted`` are attributes of the attention that hold
    (heads, features of all heads).
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


_LLAMA = Family(
    layers="model.layers",
    attention="self_attn",
    output="o_proj",
    hidden=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    mlp="mlp",
)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": Family(
        layers="model.decoder.layers",
        attention="self_attn",
        output="out_proj",
        hidden=("fc1",),
        down="fc2",
        mlp=None,
        kv_heads=None,
        width="ffn_dim",
        counted=("num_heads", None),
    ),
    "gpt2": Family(
        layers="transformer.h",
        attention="attn",
        output="c_proj",
        hidden=("mlp.c_fc",),
        down="mlp.c_proj",
        mlp="mlp",
        separate=None,
        fused="c_attn",
        kv_heads=None,
        width="n_inner",
        counted=("num_heads", "split_size"),
    ),
}


def family_of(model: nn.Module) -> Family:
    """The family of a causal language model. Raises ``ValueError`` for an unsupported architecture or quantised weights."""
    config = getattr(model, "config", None)
    kind = config.model_type if isinstance(config, PretrainedConfig) else type(model).__name__
    if kind not in FAMILIES:
        raise ValueError(f"architecture {kind!r} is not supported; supported are causal language models of {', '.join(FAMILIES)}")
    if getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"the weights of this {kind} model are quantised, and slices of them mean nothing; dequantise it first")
    family = FAMILIES[kind]
    try:
        model.get_submodule(family.layers)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} is no causal language model of family {kind!r}: it has no {family.layers!r}") from error
    return family
