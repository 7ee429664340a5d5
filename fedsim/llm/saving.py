"""Pruned language models on disk, in folders that the Hugging Face ecosystem loads without fedsim.

``config.per_layer_config``, a field of stock configurations, holds the sizes of every layer. Stock classes do not build layers from it
yet, so a copy of :mod:`fedsim.llm.pruned_model` travels along: ``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)``.
Where all layers ended alike and a plain configuration can say so, the folder is an ordinary one.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig

from fedsim.encoding import digest
from fedsim.errors import CheckpointError
from fedsim.llm import pruned_model
from fedsim.llm.families import family_of
from fedsim.llm.folders import read_model
from fedsim.llm.pruned_model import PRUNED, Family
from fedsim.llm.structures import key_value_heads
from fedsim.pruning.structures import StructureMap
from fedsim.pruning.submodel import Submodel

_SOURCE = Path(pruned_model.__file__)


def save_pruned(
    model: nn.Module,
    submodel: Submodel,
    smap: StructureMap,
    path: str | Path,
    *,
    form: Literal["per_layer", "masked"] = "per_layer",
    tokenizer: Any = None,
) -> None:
    """Write ``model``, a Hugging Face model, pruned before or not, cut to ``submodel``, as safetensors with its configuration and ``pruning.json``.

    ``form="masked"`` keeps the shapes of ``model`` with zeros, for servers that know no other. ``tokenizer``, one of Hugging Face's, goes into
    the folder too. A folder of an earlier model stays until the new one is whole. Raises ``ValueError`` for a submodel of another
    model, an unknown form, a path that holds something else, or weights that the saved architecture has no place for.
    """
    family, path = family_of(model), Path(path)
    if form not in ("per_layer", "masked"):
        raise ValueError(f"form must be 'per_layer' or 'masked', got {form!r}")
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "pruning.json").exists())):
        raise ValueError(f"{path} exists and is no folder of a pruned model; choose another path")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if form == "masked":
            with submodel.masked(model, smap):
                _write(model, family, partial)
        else:
            _write(submodel.sliced(model, smap), family, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / "pruning.json").write_text(json.dumps(_provenance(submodel, smap, form)))
        _replace(path, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_pruned(path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that :func:`save_pruned` wrote, in evaluation mode, without running code from the folder.

    Raises ``CheckpointError`` for a folder that is missing or damaged, or lacks a weight.
    """
    try:
        model = read_model(path, dtype=dtype or "auto")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no pruned language model that can be read: {error}") from error
    return model.eval()


def _replace(path: Path, partial: Path) -> None:
    """``partial`` becomes ``path``; what was there goes last."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(model: nn.Module, family: Family, path: Path) -> None:
    config = _stock(model)
    sizes = [_sizes(layer, family) for layer in model.get_submodule(family.layers).children()]
    fields = [name for name in (family.heads, family.kv_heads, family.width) if name is not None]
    if family.kv_heads and "head_dim" not in config.to_diff_dict():
        config.head_dim = int(model.get_submodule(f"{family.layers}.0.{family.attention}").head_dim)  # type: ignore[arg-type]
    stock = PRUNED[config.model_type].__base__
    if all(s == sizes[0] for s in sizes) and (plain := _plain(config, family, dict(zip(fields, sizes[0], strict=True)))) is not None:
        _write_as(stock, plain, model, path)
        return
    config.per_layer_config = {i: dict(zip(fields, s, strict=True)) for i, s in enumerate(sizes)}
    config.allow_global_per_layer_attribute_access = True
    config.auto_map = {"AutoModelForCausalLM": f"{_SOURCE.stem}.{PRUNED[config.model_type].__name__}"}
    _write_as(PRUNED[config.model_type], config, model, path)
    shutil.copyfile(_SOURCE, path / _SOURCE.name)


def _sizes(layer: nn.Module, family: Family) -> tuple[int, ...]:
    """Heads, key-value heads where the family tells them apart, and channels of a layer."""
    heads, groups = key_value_heads(layer.get_submodule(family.attention), family)
    down: Any = layer.get_submodule(family.down)
    width = int(down.weight.shape[0 if family.fused else 1])
    return (heads, groups, width) if family.kv_heads else (heads, width)


def _plain(config: PretrainedConfig, family: Family, sizes: dict[str, int]) -> PretrainedConfig | None:
    """A stock configuration whose layers all have ``sizes``; ``None`` where the family has no such model."""
    plain = copy.deepcopy(config)
    heads = sizes[family.heads]
    if heads != getattr(config, family.heads) and (family.kv_heads is None or not heads):
        return None  # the size of a head would follow from their number
    for name, value in sizes.items():
        setattr(plain, name, value)
    try:
        return type(plain)(**plain.to_diff_dict())
    except StrictDataclassError:  # a Llama whose hidden size is no multiple of its heads
        return None


def _stock(model: nn.Module) -> PretrainedConfig:
    """A copy of the model's configuration, with its cache on and without what an earlier pruning wrote into it."""
    config = copy.deepcopy(model.config)
    assert isinstance(config, PretrainedConfig), "family_of has seen to it"
    config.per_layer_config = None
    for name in ("allow_global_per_layer_attribute_access", "auto_map"):
        vars(config).pop(name, None)
    config.use_cache = True  # type: ignore[assignment]
    return config


def _write_as(kind: Any, config: PretrainedConfig, model: nn.Module, path: Path) -> None:
    _check_place(kind, config, model)
    found: Any = model.config
    try:
        model.config = config  # type: ignore[assignment]
        model.save_pretrained(path)  # type: ignore[operator]
    finally:
        model.config = found
    config.architectures = [PRUNED[config.model_type].__base__.__name__]  # the class that servers without this code know
    config.save_pretrained(path)


def _check_place(kind: Any, config: PretrainedConfig, model: nn.Module) -> None:
    """``ValueError`` unless a new ``kind`` has a place for every weight of ``model``, and no other."""
    with torch.device("meta"):
        places = {name: value.shape for name, value in kind(copy.deepcopy(config)).state_dict().items()}
    weights = {name: value.shape for name, value in model.state_dict().items()}
    if odd := sorted(set(places.items()) ^ set(weights.items())):
        name = odd[0][0]
        raise ValueError(
            f"{name!r} has shape {_shape(weights, name)} here and {_shape(places, name)} in the saved architecture {config.model_type},"
            f" which would lose it; biases that compensate a pruning need an architecture that has biases there"
        )


def _shape(shapes: Mapping[str, torch.Size], name: str) -> tuple[int, ...] | None:
    return tuple(shapes[name]) if name in shapes else None


def _provenance(submodel: Submodel, smap: StructureMap, form: str) -> dict[str, Any]:
    return {
        "form": form,
        "fingerprint": submodel.fingerprint,
        "level": submodel.level,
        "sparsity": submodel.sparsity(smap),
        "model_sparsity": submodel.model_sparsity(smap),
        "removed": {
            block.name: [i for i in range(len(block)) if not submodel.kept[smap.starts[number] + i]]
            for number, block in enumerate(smap.blocks)
        },
        "digest": digest(submodel),
    }
