"""Lanes of perceptrons under plain SGD, with the backward pass written out.

A product of the backward pass adds into the weights themselves, so a gradient is never stored: half the memory traffic of
:class:`fedsim.lanes.LaneBlock`, which it equals up to rounding.
"""

# W lanes, B examples of a batch, K classes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.lanes import LaneBlock, Rows, aligned
from fedsim.strategies import Strategy
from fedsim.tasks.base import Dataset, Task


def is_dense(task: Task, model: nn.Module, strategy: Strategy, dataset: Dataset) -> bool:
    """Whether the written-out pass computes this task: linear layers and ReLU in a row, cross entropy, SGD without momentum or clip."""
    rule = type(strategy)
    plain = rule.direction is Strategy.direction and rule.shift is Strategy.shift and not strategy.momentum and strategy.clip is None
    entropy = type(task).losses is Task.losses and type(task).logits is Task.logits
    if not (plain and entropy and type(model) is nn.Sequential):
        return False
    layers = list(model)
    flat = dataset.inputs.ndim == 2
    if layers and type(layers[0]) is nn.Flatten and (layers[0].start_dim, layers[0].end_dim) == (1, -1):
        layers, flat = layers[1:], True
    in_row = bool(layers) and type(layers[0]) is nn.Linear and type(layers[-1]) is nn.Linear
    known = all(type(m) in (nn.Linear, nn.ReLU) for m in layers) and len(set(map(id, layers))) == len(layers)
    trained = all(p.requires_grad for p in model.parameters())
    return flat and in_row and known and trained


class DenseBlock(LaneBlock):
    """See :func:`is_dense`, which must hold."""

    def step(self, dataset: Dataset, rows: Rows, index: int, active: NDArray[np.bool_] | None) -> Tensor:
        if active is not None:
            return super().step(dataset, rows, index, active)
        inputs, targets = aligned(dataset.batch(rows[self._fill].reshape(-1)))
        with torch.no_grad():
            hidden = inputs.view(self.width, rows.shape[1], -1)
            wanted = targets.view(self.width, rows.shape[1], 1)
            tape: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []
            for weight, bias, rectified in self._layers():
                tape.append((hidden, weight, bias, rectified))
                shift = hidden.new_zeros(1) if bias is None else bias[:, None]
                hidden = torch.baddbmm(shift, hidden, weight.transpose(1, 2))
                if rectified:
                    hidden = hidden.relu_()
            logs = hidden.log_softmax(-1)
            losses = -logs.gather(-1, wanted).mean((1, 2))
            slope = logs.exp_().scatter_add_(-1, wanted, logs.new_full((1, 1, 1), -1.0).expand_as(wanted)).div_(rows.shape[1])
            self._descend_along(tape, slope)
        return losses

    def _descend_along(self, tape: list[tuple[Tensor, Tensor, Tensor | None, bool]], slope: Tensor) -> None:
        """From the loss's slope in the logits (W, B, K) back through the layers, stepping each as it is passed."""
        rate, kept = self.strategy.client_lr, 1.0 - self.strategy.client_lr * self.strategy.weight_decay
        for depth in reversed(range(len(tape))):
            entering, weight, bias, _ = tape[depth]
            below = torch.bmm(slope, weight) if depth else slope
            weight.baddbmm_(slope.transpose(1, 2), entering, beta=kept, alpha=-rate)
            if bias is not None:
                bias.mul_(kept).sub_(slope.sum(1), alpha=rate)
            if depth:
                slope = below.mul_(entering > 0) if tape[depth - 1][3] else below

    def _layers(self) -> list[tuple[Tensor, Tensor | None, bool]]:
        """Weight (W, out, in), bias (W, out) and whether a ReLU follows, of each linear layer."""
        layers: list[tuple[Tensor, Tensor | None, bool]] = []
        named = dict(zip(self.layout.names, self.weights, strict=True))
        for name, module in self._model.named_children():
            if isinstance(module, nn.Linear):
                layers.append((named[f"{name}.weight"], named.get(f"{name}.bias"), False))
            elif isinstance(module, nn.ReLU):
                layers[-1] = (layers[-1][0], layers[-1][1], True)
        return layers
