"""Language models to train from scratch, by size; or from a local folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "opt", "gpt2"]
Numbers = Literal["float32", "float64", "bfloat16"]
Attention = Literal["sdpa", "eager"]
LEARNED_POSITIONS = ("opt", "gpt2")  # a text longer than their table of positions cannot be read; the others rotate


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder of one of the supported families, with random weights: ``layers`` of ``width``, MLPs of ``hidden``.

    ``heads`` query heads of ``head_dim`` features (``None``: width / heads) read ``kv_heads`` key-value heads (``None``: their own). OPT and
    GPT-2 have no others: there the default means ``None``, and another number is refused. ``positions`` bounds the length of texts where positions are learned. No dropout. ``attention`` is torch's fused one or
    written out. Clients train in float32 or float64. Raises ``ValueError`` for sizes the family has not.
    """

    architecture: Architecture = "llama"
    layers: int = 4
    width: int = 128
    heads: int = 8
    kv_heads: int | None = 4
    hidden: int = 352
    head_dim: int | None = None
    positions: int = 2048
    tied: bool = True
    dtype: Numbers = "float32"
    attention: Attention = "sdpa"

    def __post_init__(self) -> None:
        _check_choice("architecture", self.architecture, Architecture)
        _check_choice("dtype", self.dtype, Numbers)
        _check_choice("attention", self.attention, Attention)
        for name in ("layers", "width", "heads", "kv_heads", "hidden", "head_dim", "positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if self.architecture in ("opt", "gpt2"):
            if self.kv_heads not in (None, self.heads, Decoder.kv_heads):
                raise ValueError(f"kv_heads must be None in {self.architecture}, where every head has its own, got {self.kv_heads!r}")
            object.__setattr__(self, "kv_heads", None)
            if self.head_dim is not None:
                raise ValueError(f"head_dim follows from width and heads in {self.architecture}, got {self.head_dim!r}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads where head_dim is not given, got {self.width} and {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    def config(self, vocabulary: int) -> Any:
        """The Hugging Face configuration for ``vocabulary`` tokens."""
        from transformers import AutoConfig

        common = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
        common |= {"tie_word_embeddings": self.tied}
        if self.architecture == "gpt2":
            own: dict[str, Any] = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.heads, "n_inner": self.hidden}
            own |= {"n_positions": self.positions, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        else:
            own = {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads}
            own |= {"max_position_embeddings": self.positions}
            if self.architecture == "opt":
                own |= {"ffn_dim": self.hidden, "word_embed_proj_dim": self.width, "dropout": 0.0}
            else:
                own |= {"intermediate_size": self.hidden, "num_key_value_heads": self.kv_heads or self.heads}
                own |= {"head_dim": self.head_dim or self.width // self.heads}
        return AutoConfig.for_model(self.architecture, **common, **own)


@dataclass(frozen=True)
class Folder:
    """The model in the local folder ``path``, in ``dtype`` whatever it was saved in; with ``attention`` as for :class:`Decoder`."""

    path: str
    dtype: Numbers = "float32"
    attention: Attention = "sdpa"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        _check_choice("dtype", self.dtype, Numbers)
        _check_choice("attention", self.attention, Attention)


def built(model: Decoder | Folder | str, vocabulary: int) -> nn.Module:
    """A Hugging Face causal language model that keeps no cache unless asked to; a ``str`` is the path of a :class:`Folder`.

    Raises ``ValueError`` for an unsupported architecture, a folder without a whole model, or a vocabulary larger than the model's.
    """
    from transformers import AutoModelForCausalLM

    from fedsim.llm.families import family_of
    from fedsim.llm.folders import read_model

    model = Folder(model) if isinstance(model, str) else model
    kind: Any = {"dtype": getattr(torch, model.dtype), "attn_implementation": model.attention}
    if isinstance(model, Decoder):
        fresh: nn.Module = AutoModelForCausalLM.from_config(model.config(vocabulary), **kind)  # type: ignore[no-untyped-call]
        return fresh
    if not Path(model.path).is_dir():
        raise ValueError(f"model must be a Decoder or a local folder, got {model.path!r}")
    try:
        found = read_model(model.path, **kind)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{model.path} holds no causal language model that can be read: {error}") from error
    family_of(found)
    config: Any = found.config
    if config.vocab_size < vocabulary:
        raise ValueError(
            f"the tokenizer has {vocabulary} tokens, the model in {model.path} knows {config.vocab_size}; they do not belong together"
        )
    config.use_cache = False
    return found


def check_length(model: Decoder | Folder | str, length: int) -> None:
    """``ValueError`` for texts of ``length`` tokens that a :class:`Decoder` with learned positions cannot read."""
    if isinstance(model, Decoder) and model.architecture in LEARNED_POSITIONS and length > model.positions:
        raise ValueError(
            f"length={length} is over the positions={model.positions} of this {model.architecture}; lower it, or raise positions"
        )


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name} must be one of {get_args(allowed)}, got {value!r}")
