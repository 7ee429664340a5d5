"""A space of channels under construction: who produces, scales and reads them, and why they may have to stay."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import lcm

import numpy as np
from torch import nn

from fedsim.pruning.structures import Block, Member, Resize, Role


@dataclass(frozen=True)
class Flow:
    """What a graph node carries: channels of ``space`` along axis ``dim``, each ``width`` consecutive entries wide."""

    space: "Space"
    dim: int
    width: int


@dataclass(frozen=True)
class Use:
    """A weight whose dimension ``dim`` holds ``width`` consecutive positions for each channel."""

    weight: str
    dim: int
    width: int
    role: Role


@dataclass(eq=False)
class Space:
    """``channels`` channels that live and leave together in runs of ``chunk``; spaces that were joined share a root."""

    channels: int
    kind: str
    producers: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    resizes: list[tuple[str, str, int, int]] = field(default_factory=list)  # module, attribute, numerator, denominator per channel
    chunk: int = 1
    joined: bool = False
    pinned: str | None = None
    parent: "Space | None" = None

    @classmethod
    def of(cls, name: str, module: nn.Module, convolution: bool) -> "Space":
        """The outputs of a Linear or convolution."""
        attribute = "out_channels" if convolution else "out_features"
        space = cls(getattr(module, attribute), "filters" if convolution else "channel", [name])
        space._own(name, module, 1, "producer")
        space.resizes.append((name, attribute, 1, 1))
        return space

    def root(self) -> "Space":
        return self if self.parent is None else self.parent.root()

    def pin(self, reason: str) -> None:
        root = self.root()
        root.pinned = root.pinned or reason

    def join(self, other: "Space") -> None:
        """One space from now on: the two were added or multiplied channel by channel."""
        first, second = self.root(), other.root()
        if first is second:
            return
        second.parent = first
        first.producers += second.producers
        first.uses += second.uses
        first.resizes += second.resizes
        first.chunk = lcm(first.chunk, second.chunk)
        first.pinned = first.pinned or second.pinned
        first.joined = True
        if second.kind == "filters":
            first.kind = "filters"

    def consumed_by(self, weight: str, module: str, attribute: str, features: int, width: int) -> None:
        """``weight`` reads the channels along its dimension 1."""
        root = self.root()
        if features != root.channels * width:
            raise AssertionError(f"{module} reads {features} features of {root.channels} channels x {width}")
        root.uses.append(Use(weight, 1, width, "consumer"))
        root.resizes.append((module, attribute, width, 1))

    def normalised_by(self, name: str, module: nn.Module, width: int, *, each: Mapping[str, int], groups: int | None = None) -> None:
        """The channels pass through ``module``, which keeps values of its own for each; with ``groups``, only whole groups may leave."""
        root = self.root()
        root._own(name, module, width, "producer")
        root.resizes += [(name, attribute, amount, 1) for attribute, amount in each.items()]
        if groups is not None:
            root.chunk = lcm(root.chunk, root.channels // groups)
            root.resizes.append((name, "num_groups", groups, root.channels))

    def reason(self, couple_residual: bool) -> str | None:
        """Why these channels are not prunable, or ``None``."""
        if self.pinned:
            return self.pinned
        if self.joined and not couple_residual:
            return "its channels are joined by a residual sum; couple_residual=True prunes them together"
        if not any(use.role == "consumer" for use in self.uses):
            return "nothing reads its channels"
        if self.channels <= self.chunk:
            return "all its channels are one normalisation group"
        return None

    def block(self) -> Block:
        chunk, name = self.chunk, self.producers[0]
        members = tuple(Member(u.weight, u.dim, np.arange(self.channels * u.width).reshape(-1, chunk * u.width), u.role) for u in self.uses)
        resizes = tuple(Resize(module, attribute, chunk * up // down) for module, attribute, up, down in self.resizes)
        return Block(name, self.kind, members, resizes, 2.0 * self.channels if self.kind == "channel" else None)

    def _own(self, name: str, module: nn.Module, width: int, role: Role) -> None:
        """Dimension 0 of every parameter and running statistic of ``module``."""
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.ndim:
                self.uses.append(Use(f"{name}.{own}", 0, width, role))
