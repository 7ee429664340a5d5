"""A factor xi on every structure's output, where its consumers read it: 0 silences the structure, dL/dxi is its importance."""

# B batch, F input features, n structures of one block, w features one structure owns

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.pruning.structures import Bools, Member, StructureMap


@dataclass(frozen=True, eq=False)
class Tap:
    """What one consumer of a block reads: ``input`` before the gates, ``output`` after them, channels along axis ``dim``."""

    block: int
    member: Member
    dim: int
    input: Tensor
    output: Tensor


@contextmanager
def gated(model: nn.Module, smap: StructureMap, kept: Bools, *, record: bool = True) -> Iterator[list[Tap]]:
    """Hooks that multiply every consumer's input by its gates (1 kept, 0 removed) and ``record`` it; gone after the block.

    The outputs are those of the masked model, and the weights stay untouched.
    """
    taps: list[Tap] = []
    handles = []
    try:
        for number, block in enumerate(smap.blocks):
            for member in block.members:
                if member.role == "consumer":
                    module = model.get_submodule(member.weight.rpartition(".")[0])
                    factors = _factors(module, smap, number, member, kept)
                    if record:
                        handles.append(module.register_forward_pre_hook(partial(_gate, taps, number, member, factors)))
                    elif factors is not None:
                        handles.append(module.register_forward_pre_hook(partial(_scaled, factors)))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def structure_products(tap: Tap, gradient: Tensor, *, positionwise: bool) -> Tensor:
    """Input x gradient summed over each structure's features, (B, n); ``positionwise`` takes absolute values first."""
    product = (tap.input * gradient).movedim(tap.dim, -1)
    if positionwise:
        product = product.abs()
    features = product.flatten(1, -2).sum(1) if product.ndim > 2 else product
    num, width = tap.member.positions.shape
    if num * width == features.shape[1]:
        return features.view(-1, num, width).sum(2) if width > 1 else features
    positions = torch.from_numpy(tap.member.positions).to(features.device)
    return features[:, positions].sum(2)


def _factors(module: nn.Module, smap: StructureMap, block: int, member: Member, kept: Bools) -> Tensor | None:
    """Gates (F,) shaped for the consumer's input; ``None`` while all its structures are kept."""
    leaving = smap.positions(block, member, kept)[1]
    if not len(leaving):
        return None
    weight = module.get_parameter(member.weight.rpartition(".")[2])
    factors = torch.ones(weight.shape[member.dim], dtype=weight.dtype, device=weight.device)
    factors[torch.from_numpy(leaving).to(weight.device)] = 0
    return factors.view(-1, *([1] * (weight.ndim - 2))) if is_convolution(module) else factors


def _gate(taps: list[Tap], block: int, member: Member, factors: Tensor | None, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    value: Tensor = args[0]
    output = value.view_as(value) if factors is None else value * factors
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    taps.append(Tap(block, member, 1 if is_convolution(module) else -1, value.detach(), output))
    return (output, *args[1:])


def _scaled(factors: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * factors, *args[1:])


def is_convolution(module: nn.Module) -> bool:
    """Whether channels lie along axis 1."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
