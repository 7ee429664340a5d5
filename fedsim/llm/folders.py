"""Reading a model from a local folder, whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from fedsim.llm.pruned_model import PRUNED


def read_model(path: str | Path, **settings: Any) -> nn.Module:
    """The causal language model in the folder ``path``, its layers of unequal sizes where it was pruned so; no code of the folder runs.

    ``settings`` go to ``from_pretrained``. Raises ``ValueError`` naming weights that the folder lacks, which would be drawn at random, or that
    the model has no place for; and whatever transformers raises for files that are missing or damaged.
    """
    config = PretrainedConfig.get_config_dict(str(path), local_files_only=True)[0]
    loader: Any = PRUNED[config["model_type"]] if "per_layer_config" in config else AutoModelForCausalLM
    model: nn.Module
    with _without_progress():
        model, found = loader.from_pretrained(path, local_files_only=True, use_safetensors=True, output_loading_info=True, **settings)
    for what, names in (("lacks", found["missing_keys"]), ("has, and its model has no place for,", found["unexpected_keys"])):
        if names:
            raise ValueError(f"{path} {what} {len(names)} weights, among them {min(names)!r}")
    return model


@contextmanager
def _without_progress() -> Iterator[None]:
    """Every worker loads the model; none draws a bar of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
