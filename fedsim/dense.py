"""Lanes of perceptrons, with the forward and the backward pass written out.

Under plain SGD a product of the backward pass adds into the weights themselves, so a gradient is never stored; other local rules are
given gradients. Both equal :class:`fedsim.lanes.LaneBlock` up to rounding, at a fraction of its dispatch.
"""

# W lanes, T local steps, B examples of a batch, K classes, D features

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.lanes import LaneBlock, Rows, StepError
from fedsim.strategies import Strategy
from fedsim.tasks.base import Dataset, Task

_NARROW = 16
_GATHERED = 2**21  # scalars of inputs fetched at once


def is_dense(task: Task, model: nn.Module, dataset: Dataset) -> bool:
    """Whether the written-out pass computes this task: linear layers and ReLU in a row, cross entropy."""
    entropy = type(task).losses is Task.losses and type(task).logits is Task.logits
    if not entropy or type(model) is not nn.Sequential:
        return False
    layers = list(model)
    flat = dataset.inputs.ndim == 2
    if layers and type(layers[0]) is nn.Flatten and (layers[0].start_dim, layers[0].end_dim) == (1, -1):
        layers, flat = layers[1:], True
    in_row = bool(layers) and type(layers[0]) is nn.Linear and type(layers[-1]) is nn.Linear
    known = all(type(m) in (nn.Linear, nn.ReLU) for m in layers) and len(set(map(id, layers))) == len(layers)
    trained = all(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in layers)
    return flat and in_row and known and trained


class _Layer(NamedTuple):
    """Weight (W, out, in) and bias (W, out) of a linear layer, where they stand in the layout, and whether a ReLU follows."""

    weight: Tensor
    bias: Tensor | None
    at: tuple[int, int]
    rectified: bool


class DenseBlock(LaneBlock):
    """See :func:`is_dense`, which must hold."""

    def train(self, dataset: Dataset, rows: Rows, low: int, active: NDArray[np.bool_]) -> Tensor:
        rule = self.strategy
        plain = type(rule).direction is Strategy.direction and self._shift[0] is None and not rule.momentum and rule.clip is None
        layers, (_, steps, batch) = self._layers(), rows.shape
        losses = torch.empty(steps, self.width, batch, dtype=self.weights[0].dtype)
        chunk = max(1, _GATHERED // (self.width * batch * int(np.prod(dataset.inputs.shape[1:]))))
        t = 0
        try:
            with torch.no_grad():
                for first in range(0, steps, chunk):
                    taken = rows[self._fill, first : first + chunk].transpose(1, 0, 2)
                    inputs, targets = dataset.batch(taken.reshape(-1))
                    inputs, targets = inputs.view(*taken.shape, -1), targets.view(*taken.shape, 1)
                    for t in range(first, first + len(taken)):
                        tape, slope = self._forward(layers, inputs[t - first], targets[t - first], losses[t])
                        if plain and active[t].all():
                            self._descend_along(layers, tape, slope)
                        else:
                            taking = None if active[t].all() else self._lanes_of(active[t])
                            self._descend(self._gradients(layers, tape, slope), taking, lanes=True)
        except Exception as error:
            raise StepError(t) from error
        return losses.mean(2)

    def _forward(self, layers: list[_Layer], inputs: Tensor, targets: Tensor, losses: Tensor) -> tuple[list[Tensor], Tensor]:
        """What enters each layer (W, B, in), and the slope (W, B, K) of the summed losses in the logits; ``losses`` (W, B) are written."""
        hidden, tape = inputs, []
        for layer in layers:
            tape.append(hidden)
            hidden = _through(layer, hidden)
            if layer.rectified:
                hidden.relu_()
        logs = hidden.log_softmax(-1)
        torch.neg(logs.gather(-1, targets).squeeze(-1), out=losses)
        return tape, logs.exp_().scatter_add_(-1, targets, logs.new_full((1, 1, 1), -1.0).expand_as(targets))

    def _descend_along(self, layers: list[_Layer], tape: list[Tensor], slope: Tensor) -> None:
        """From the slope back through the layers, stepping each as it is passed."""
        rate, kept = self.strategy.client_lr / slope.shape[1], 1.0 - self.strategy.client_lr * self.strategy.weight_decay
        for depth in reversed(range(len(layers))):
            layer = layers[depth]
            below = torch.bmm(slope, layer.weight) if depth else slope
            layer.weight.baddbmm_(slope.transpose(1, 2), tape[depth], beta=kept, alpha=-rate)
            if layer.bias is not None:
                bias = layer.bias if kept == 1.0 else layer.bias.mul_(kept)
                bias.sub_(slope.sum(1), alpha=rate)
            slope = _behind(layers, depth, below, tape[depth])

    def _gradients(self, layers: list[_Layer], tape: list[Tensor], slope: Tensor) -> list[Tensor]:
        """Of the mean losses in every parameter, in layout order."""
        gradients: list[Tensor] = [slope] * len(self.weights)
        slope = slope / slope.shape[1]
        for depth in reversed(range(len(layers))):
            layer = layers[depth]
            gradients[layer.at[0]] = torch.bmm(slope.transpose(1, 2), tape[depth])
            if layer.bias is not None:
                gradients[layer.at[1]] = slope.sum(1)
            below = torch.bmm(slope, layer.weight) if depth else slope
            slope = _behind(layers, depth, below, tape[depth])
        return gradients

    def _layers(self) -> list[_Layer]:
        layers: list[_Layer] = []
        place = {name: i for i, name in enumerate(self.layout.names)}
        for name, module in self._model.named_children():
            if isinstance(module, nn.Linear):
                at = place[f"{name}.weight"], place.get(f"{name}.bias", -1)
                layers.append(_Layer(self.weights[at[0]], None if at[1] < 0 else self.weights[at[1]], at, False))
            elif isinstance(module, nn.ReLU):
                layers[-1] = layers[-1]._replace(rectified=True)
        return layers


def _through(layer: _Layer, entering: Tensor) -> Tensor:
    """What leaves the layer, (W, B, out); where that is narrow, by the product whose rows are long, which is the faster one."""
    if layer.weight.shape[1] < _NARROW:
        turned = entering.transpose(1, 2)
        left = torch.bmm(layer.weight, turned) if layer.bias is None else torch.baddbmm(layer.bias[:, :, None], layer.weight, turned)
        return left.transpose(1, 2)
    turned = layer.weight.transpose(1, 2)
    return torch.bmm(entering, turned) if layer.bias is None else torch.baddbmm(layer.bias[:, None], entering, turned)


def _behind(layers: list[_Layer], depth: int, below: Tensor, entering: Tensor) -> Tensor:
    """The slope in what enters layer ``depth``, taken back through the ReLU before it."""
    if not (depth and layers[depth - 1].rectified):
        return below
    masked: Tensor = torch.ops.aten.threshold_backward(below, entering, 0.0)  # a product with booleans would first convert them
    return masked
