"""A model's trainable parameters as one flat vector, the form in which they travel, are merged and are stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a module's parameters, in ``named_parameters`` order; ``size`` scalars in all.

    Raises ``ValueError`` for parameters of mixed dtype and for normalisation with running statistics, whose buffers
    are not parameters and would silently differ between clients.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        for name, child in module.named_modules():
            if getattr(child, "running_mean", None) is not None:
                raise ValueError(
                    f"module {name!r} ({type(child).__name__}) keeps running statistics, which clients cannot share; use GroupNorm or track_running_stats=False"
                )
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        dtypes = {str(p.dtype).removeprefix("torch.") for _, p in named}
        if len(dtypes) != 1:
            raise ValueError(f"a model's trainable parameters must share one dtype, got {sorted(dtypes) or 'no parameters'}")
        return cls(tuple(n for n, _ in named), tuple(tuple(p.shape) for _, p in named), dtypes.pop())

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each parameter in the flat vector, and its total size at the end."""
        return tuple(np.concatenate([[0], np.cumsum([prod(s) for s in self.shapes])]).astype(int).tolist())

    @property
    def size(self) -> int:
        return self.offsets[-1]

    @property
    def bytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    def flatten(self, module: nn.Module) -> NDArray[np.floating]:
        """A copy of the module's parameters, (P,). Raises ``ValueError`` for bfloat16, which numpy has not."""
        if self.dtype == "bfloat16":
            raise ValueError("clients cannot exchange parameters of dtype bfloat16; build the model in float32")
        parameters = dict(module.named_parameters())
        return np.concatenate([parameters[n].detach().cpu().numpy().reshape(-1) for n in self.names])

    def load(self, module: nn.Module, vector: NDArray[np.floating]) -> None:
        """Copy ``vector`` (P,) into the module's parameters."""
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.views(torch.from_numpy(np.asarray(vector).copy())).items():
                parameters[name].copy_(value)

    def views(self, stacked: Tensor) -> Mapping[str, Tensor]:
        """Views of ``stacked`` (..., P) by name, each (..., *shape)."""
        lead = stacked.shape[:-1]
        return {
            name: stacked[..., start:stop].view(*lead, *shape)
            for name, shape, start, stop in zip(self.names, self.shapes, self.offsets, self.offsets[1:], strict=False)
        }
