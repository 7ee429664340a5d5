"""Which supported family a model belongs to, what it may not be, and how long its texts may get."""

from torch import nn
from transformers import PretrainedConfig

from fedsim.llm.decoder import LEARNED_POSITIONS
from fedsim.llm.pruned_model import FAMILIES, Family


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


def check_positions(model: nn.Module, tokens: int, what: str) -> None:
    """``ValueError`` if a text of ``tokens`` tokens, read after ``what``, outgrows the positions that ``model`` has learned."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) in LEARNED_POSITIONS and tokens > config.max_position_embeddings:  # type: ignore[union-attr]
        raise ValueError(f"{what} need {tokens} positions, and this {config.model_type} has {config.max_position_embeddings}")  # type: ignore[union-attr]
