"""What the consumers of structures read: norms, means and variances of their input features over a calibration set."""

# n positions of a batch, F input features of a consumer, L tokens

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.pruning.gates import is_convolution
from fedsim.pruning.gradients import Objective, finite_losses
from fedsim.pruning.structures import StructureMap

IGNORED = -100  # the target that torch's losses pass over


@dataclass(eq=False)
class Moments:
    """``number`` inputs seen; their ``mean`` (F,) and summed squared deviations ``spread`` (F,), in float64 (Chan et al., 1983)."""

    number: int
    mean: Tensor
    spread: Tensor

    @property
    def norm(self) -> Tensor:
        """Euclidean norm (F,) of each feature over all inputs."""
        return (self.spread + self.number * self.mean**2).sqrt()

    @property
    def variance(self) -> Tensor:
        """Sample variance (F,)."""
        return self.spread / max(self.number - 1, 1)

    def add(self, inputs: Tensor) -> None:
        """Take in ``inputs`` (n, F)."""
        if not len(inputs):
            return
        inputs = inputs.double()
        number, mean = len(inputs), inputs.mean(0)
        total, shift = self.number + number, mean - self.mean
        self.spread += ((inputs - mean) ** 2).sum(0) + shift**2 * (self.number * number / total)
        self.mean += shift * (number / total)
        self.number = total


def moments(model: nn.Module, smap: StructureMap, objective: Objective, batches: Sequence[Any]) -> Mapping[str, Moments]:
    """Moments of what each consumer reads, by the name of its weight; one forward pass a batch, all positions counted but padding (:func:`positions`).

    Raises ``FedsimError`` for a loss that is not finite, ``ValueError`` naming a consumer that never ran.
    """
    found: dict[str, Moments] = {}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            with _watched(model, smap, batch, found):
                finite_losses(objective, model, batch, number)
    if idle := [name for name in _consumers(smap) if name not in found]:
        raise ValueError(f"the objective never runs the consumers {idle}, so nothing is known of what they read")
    return found


def positions(batch: Any, values: Tensor) -> Tensor:
    """Rows (n, F) of ``values`` (..., F), without the positions of a text after the last one whose target is asked for.

    What stands there is padding: nothing a causal model reads so late can move its loss. Applies to integer targets (..., L), the second part of the batch,
    where ``values`` are (texts, L, F) or (texts x L, F); all positions count elsewhere.
    """
    rows = values.flatten(0, -2)
    targets = batch[1] if len(batch) > 1 else None
    if not isinstance(targets, Tensor) or targets.ndim < 2 or targets.is_floating_point() or len(rows) != targets.numel():
        return rows
    length = targets.shape[-1]
    if values.ndim > 3 or (values.ndim == 3 and values.shape[1] != length):
        return rows
    asked = targets.reshape(-1, length) != IGNORED
    read = asked.flip(1).cumsum(1).flip(1) > 0
    return rows if bool(read.all()) else rows[read.flatten()]


def _consumers(smap: StructureMap) -> list[str]:
    return list(dict.fromkeys(m.weight for b in smap.blocks for m in b.members if m.role == "consumer"))


@contextmanager
def _watched(model: nn.Module, smap: StructureMap, batch: Any, into: dict[str, Moments]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def take(module: nn.Module, args: tuple[Any, ...]) -> None:
            features = args[0].detach().movedim(1 if is_convolution(module) else -1, -1)
            zeros = torch.zeros(features.shape[-1], dtype=torch.float64, device=features.device)
            into.setdefault(name, Moments(0, zeros, zeros.clone())).add(positions(batch, features))

        return take

    handles = [model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(watch(name)) for name in _consumers(smap)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
