"""Tiny random language models of every family, with biases and norms that are not trivial."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, TOKENS = 50, 12
COMMON = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ROTARY = {**COMMON, "hidden_size": 32, "intermediate_size": 44, "max_position_embeddings": 64}


def llama(groups: int = 4, *, tied: bool = False, bias: bool = False, heads: int = 8, **changes: int) -> nn.Module:
    fields = {**ROTARY, **changes}
    config = LlamaConfig(
        **fields, num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias
    )
    return LlamaForCausalLM(config)


def gpt2(layers: int = 3) -> nn.Module:
    fields = {name: value for name, value in COMMON.items() if name != "num_hidden_layers"}
    return GPT2LMHeadModel(GPT2Config(**fields, n_embd=32, n_layer=layers, n_head=4, n_positions=64))


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(**COMMON, hidden_size=32, ffn_dim=44, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64)
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama, one key-value head": lambda: llama(1),
    "llama, no groups, biases, tied": lambda: llama(8, tied=True, bias=True),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**ROTARY, num_attention_heads=4, num_key_value_heads=2, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**ROTARY, num_attention_heads=4, num_key_value_heads=2)),
    "qwen3, wide heads": lambda: Qwen3ForCausalLM(Qwen3Config(**ROTARY, num_attention_heads=4, num_key_value_heads=2, head_dim=16)),
    "opt": opt,
    "gpt2": gpt2,
}


def built(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose vectors (norms, biases) are drawn too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[name]().to(dtype).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim == 1 else 0.05)
    model.config.use_cache = False
    return model


def tokens(batch: int = 3, length: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
