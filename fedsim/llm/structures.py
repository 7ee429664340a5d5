"""The structures of a causal language model: key-value heads with their query heads, MLP channels, or whole layers.

A head group is one key-value head and the query heads that read it: rows of q, k and v and the columns of the output projection
(arXiv:2510.18030 prunes single query heads and keeps all keys and values; a group also shrinks the cache and keeps every layer
rectangular). Biases of the rows leave with them; norms over a head, which all heads share, and biases of output projections stay.
"""

# D hidden size, H query heads, K key-value heads, d features of a head, F channels of an MLP, T tokens

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsim.llm.families import family_of
from fedsim.llm.pruned_model import Family, VacantAttention, VacantMLP
from fedsim.pruning.structures import Block, Ints, Member, Resize, Role, StructureMap
from fedsim.pruning.tracing import weights_of

Unit = Literal["head_group", "channel", "layer"]


def language_structures(model: nn.Module, tokens: int, *, units: Sequence[Unit] = ("head_group", "channel")) -> StructureMap:
    """The structures of ``model``, a Hugging Face causal language model of a supported family, pruned before or not.

    FLOPs are those of one example of ``tokens`` tokens, prefill with every pair of tokens counted. ``units=("layer",)`` makes
    each layer one structure. Raises ``ValueError`` for an unsupported architecture, quantised weights, modules used twice or unknown units.
    """
    family = family_of(model)
    if not units or set(units) - set(get_args(Unit)) or ("layer" in units and len(units) > 1):
        raise ValueError(f"units must be ('layer',) or some of ('head_group', 'channel'), got {tuple(units)!r}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens!r}")
    _refuse_reused(model)
    blocks: list[Block] = []
    for number, (prefix, layer) in enumerate(_layers(model, family)):
        found = [_attention(family, prefix, layer, number), _mlp(family, prefix, layer, number)]
        present = [block for block in found if block is not None]
        if "layer" in units:
            blocks += [_joined(prefix, number, present)] if present else []
        else:
            blocks += [block for block in present if block.kind in units]
    return StructureMap(weights_of(model, _flops(model, tokens)), tuple(blocks), {}, tokens)


def key_value_heads(attention: nn.Module, family: Family) -> tuple[int, int]:
    """(H, K) of an attention module, read from its weights."""
    d = int(attention.head_dim)  # type: ignore[arg-type]
    if family.fused:
        heads = _features(attention.get_submodule(family.fused))[1] // (3 * d)
        return heads, heads
    assert family.separate is not None
    q, k, _ = (_features(attention.get_submodule(name))[1] // d for name in family.separate)
    return q, k


def _layers(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.get_submodule(family.layers).named_children():
        yield f"{family.layers}.{name}", layer


def _attention(family: Family, prefix: str, layer: nn.Module, number: int) -> Block | None:
    attention, name = layer.get_submodule(family.attention), f"{prefix}.{family.attention}"
    heads, groups = key_value_heads(attention, family)
    if not groups:
        return None
    d, per_group = int(attention.head_dim), heads // groups  # type: ignore[arg-type]
    if heads % groups:
        raise ValueError(f"{name} has {heads} query heads for {groups} key-value heads; every key-value head needs as many")
    queries, keys = _runs(groups, per_group * d), _runs(groups, d)
    wide = per_group * d
    members: list[Member] = []
    resizes: list[Resize] = []
    if family.fused:
        fused = np.concatenate([keys + i * groups * d for i in range(3)], axis=1)
        _add(members, resizes, f"{name}.{family.fused}", attention.get_submodule(family.fused), fused, "producer", 3 * d)
    else:
        assert family.separate is not None
        for own, positions, width in zip(family.separate, (queries, keys, keys), (wide, d, d), strict=True):
            _add(members, resizes, f"{name}.{own}", attention.get_submodule(own), positions, "producer", width)
    output = attention.get_submodule(family.output)
    _add(members, resizes, f"{name}.{family.output}", output, queries, "consumer", wide)
    resizes += [Resize(name, a, each) for a, each in zip(family.counted, (per_group, wide), strict=True) if a is not None]
    itemsize = output.weight.element_size()  # type: ignore[operator, union-attr]
    return Block(
        name,
        "head_group",
        tuple(members),
        tuple(resizes),
        published=4.0 * d * _features(output)[1],
        layer=number,
        pair_flops=4 * wide,
        kv_bytes=2 * d * itemsize,
        vacated=((name, partial(VacantAttention, output=family.output)),),
    )


def _mlp(family: Family, prefix: str, layer: nn.Module, number: int) -> Block | None:
    down = layer.get_submodule(family.down)
    channels = _features(down)[0]
    if not channels:
        return None
    each = _runs(channels, 1)
    members: list[Member] = []
    resizes: list[Resize] = []
    for own in family.hidden:
        _add(members, resizes, f"{prefix}.{own}", layer.get_submodule(own), each, "producer", 1)
    _add(members, resizes, f"{prefix}.{family.down}", down, each, "consumer", 1)
    return Block(
        f"{prefix}.{family.mlp or family.hidden[0]}",
        "channel",
        tuple(members),
        tuple(resizes),
        published=(len(family.hidden) + 1.0) * channels,
        layer=number,
        vacated=() if family.mlp is None else ((f"{prefix}.{family.mlp}", partial(VacantMLP, output=family.down.rpartition(".")[2])),),
    )


def _joined(prefix: str, number: int, parts: Sequence[Block]) -> Block:
    """One structure that owns all that the ``parts`` of a layer own."""
    return Block(
        prefix,
        "layer",
        tuple(Member(m.weight, m.dim, m.positions.reshape(1, -1), m.role) for part in parts for m in part.members),
        tuple(Resize(r.module, r.attribute, r.each * len(part)) for part in parts for r in part.resizes),
        layer=number,
        pair_flops=sum(part.pair_flops * len(part) for part in parts),
        kv_bytes=sum(part.kv_bytes * len(part) for part in parts),
        vacated=tuple(v for part in parts for v in part.vacated),
    )


def _add(members: list[Member], resizes: list[Resize], name: str, module: nn.Module, positions: Ints, role: Role, width: int) -> None:
    """``positions`` (n, w) along the outputs of a producer or the inputs of a consumer, ``width`` features each."""
    outputs = role == "producer"
    transposed = isinstance(module, Conv1D)
    members.append(Member(f"{name}.weight", int(outputs == transposed), positions, role))
    if outputs and isinstance(module.bias, Tensor):
        members.append(Member(f"{name}.bias", 0, positions, role))
    if not transposed:
        resizes.append(Resize(name, "out_features" if outputs else "in_features", width))
    elif outputs:
        resizes.append(Resize(name, "nf", width))
    else:
        resizes.append(Resize(name, "nx", width))


def _runs(number: int, width: int) -> Ints:
    """(number, width) consecutive positions."""
    return np.arange(number * width).reshape(number, width)


def _features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a projection."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = weight.shape
    return (int(shape[0]), int(shape[1])) if isinstance(module, Conv1D) else (int(shape[1]), int(shape[0]))


def _flops(model: nn.Module, tokens: int) -> dict[str, int]:
    """FLOPs of one scalar of every projection in an example; a head tied to the embedding computes, an embedding alone does not."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(module.weight)]: 2 * tokens for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}


def _refuse_reused(model: nn.Module) -> None:
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | Conv1D) and owner.setdefault(id(module), name) != name:
            raise ValueError(f"modules {owner[id(module)]!r} and {name!r} are one; pruning one use would prune the other")
