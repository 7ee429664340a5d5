"""Lanes of perceptrons, with the forward and the backward pass written out, in buffers made once for all steps.

A product of the backward pass adds straight into the weights, or the momenta, so a gradient is kept only for local rules that look at
it. Both equal :class:`fedsim.lanes.LaneBlock` up to rounding, at a fraction of its dispatch.
"""

# W lanes, T local steps, B examples of a batch, K classes, D features

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.lanes import LaneBlock, Rows, StepError
from fedsim.mounted import Examples
from fedsim.strategies import Strategy
from fedsim.tasks.base import Dataset, Task

_FETCHED = 2**21  # scalars of inputs and targets fetched at once


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
    """Weight (W, out, in) and bias (W, out) of a linear layer, where they stand in the layout, and its buffers; whether a ReLU follows.

    ``out`` (W, B, out) leaves the layer, ``slope`` (W, out, B) is that of the losses in it. In the last layer they are one buffer (W, K, B), first logits,
    then slope: with few classes its products have the longer rows. ``back`` (W, B, in) is the slope in what enters, where one is needed.
    """

    weight: Tensor
    bias: Tensor | None
    at: tuple[int, int]
    out: Tensor
    slope: Tensor
    back: Tensor | None
    rectified: bool = False


class DenseBlock(LaneBlock):
    """See :func:`is_dense`, which must hold."""

    def train(self, dataset: Examples, rows: Rows, low: int, active: NDArray[np.bool_]) -> Tensor:
        layers, steps, t = self._layers(rows.shape[2]), rows.shape[1], 0
        losses = self.weights[0].new_empty(steps, self.width)
        classes = layers[-1].weight.shape[1]
        chunk = max(1, _FETCHED // (self.width * rows.shape[2] * (layers[0].weight.shape[2] + 2 * classes)))
        try:
            with torch.no_grad():
                for first in range(0, steps, chunk):
                    t = first
                    inputs, targets = self._fetched(dataset, rows[self._fill, first : first + chunk])
                    t += _known(targets, classes)
                    hot = inputs.new_zeros(len(inputs), *layers[-1].out.shape).scatter_(2, targets, 1.0)
                    logs = torch.empty_like(hot)
                    for t, parts in enumerate(zip(inputs, logs, hot, strict=True), first):
                        _forward(layers, *parts)
                        self._step_back(layers, parts[0], active[t])
                    losses[first : first + chunk] = logs.gather(2, targets).mean((2, 3)).neg_()
        except Exception as error:
            raise StepError(t) from error
        return losses

    def _fetched(self, dataset: Examples, rows: Rows) -> tuple[Tensor, Tensor]:
        """Inputs (T, W, B, D) and targets (T, W, 1, B) of the examples ``rows`` (W, T, B)."""
        inputs, targets = dataset.batch(rows.reshape(-1))
        lanes, steps, batch = rows.shape
        return inputs.view(lanes, steps, batch, -1).transpose(0, 1), targets.view(lanes, steps, 1, batch).transpose(0, 1)

    @staticmethod
    def width_of(count: int, lanes: int) -> int:
        return max(count, min(8, lanes))

    def _step_back(self, layers: Sequence[_Layer], inputs: Tensor, taking: NDArray[np.bool_]) -> None:
        """One step of the clients ``taking`` (n,), with the slope of the losses in the last layer."""
        rule = self.strategy
        if type(rule).direction is not Strategy.direction or rule.clip is not None:
            self._descend(self._gradients(layers, inputs), None if taking.all() else self._lanes_of(taking), lanes=True)
        elif taking.all():
            self._descend_along(layers, inputs)
        else:  # every lane steps, then the idle are put back: whether somebody idles must not change how the others round
            idle = torch.from_numpy(np.flatnonzero(~taking[self._fill])).to(self.device)
            before = [w[idle] for w in self.weights]
            self._descend_along(layers, inputs)
            for weight, value in zip(self.weights, before, strict=True):
                weight[idle] = value

    def _descend_along(self, layers: Sequence[_Layer], inputs: Tensor) -> None:
        """From the slope back through the layers, stepping each as it is passed."""
        rule, into = self.strategy, self.weights
        scale, kept = -rule.client_lr, 1.0 - rule.client_lr * rule.weight_decay
        if self.momenta is not None:
            into, scale, kept = self.momenta, 1.0, rule.momentum
        for layer, entering in _backwards(layers, inputs):
            into[layer.at[0]].baddbmm_(layer.slope, entering, beta=kept, alpha=scale / inputs.shape[1])
            if layer.bias is not None:
                bias = into[layer.at[1]] if kept == 1.0 else into[layer.at[1]].mul_(kept)
                bias.add_(layer.slope.sum(2), alpha=scale / inputs.shape[1])
        if self._shift[0] is not None:
            torch._foreach_add_(into, list(self._shift), alpha=scale)  # type: ignore[arg-type]
        if self.momenta is not None:
            if rule.weight_decay:
                torch._foreach_add_(into, self.weights, alpha=rule.weight_decay)
            torch._foreach_add_(self.weights, into, alpha=-rule.client_lr)

    def _gradients(self, layers: Sequence[_Layer], inputs: Tensor) -> list[Tensor]:
        """Of the mean losses in every parameter, in layout order."""
        gradients = list(self.weights)
        layers[-1].slope.div_(inputs.shape[1])
        for layer, entering in _backwards(layers, inputs):
            gradients[layer.at[0]] = torch.bmm(layer.slope, entering)
            if layer.bias is not None:
                gradients[layer.at[1]] = layer.slope.sum(2)
        return gradients

    def _layers(self, batch: int) -> list[_Layer]:
        """The linear layers, first to last, with buffers for batches of ``batch``."""
        layers: list[_Layer] = []
        place = {name: i for i, name in enumerate(self.layout.names)}
        linear = {name: m for name, m in self._model.named_children() if isinstance(m, nn.Linear)}
        backs = [None, *(self.weights[0].new_empty(self.width, batch, m.in_features) for m in list(linear.values())[1:])]
        for name, module in self._model.named_children():
            if isinstance(module, nn.ReLU):
                layers[-1] = layers[-1]._replace(rectified=True)
            if name not in linear:
                continue
            at = place[f"{name}.weight"], place.get(f"{name}.bias", -1)
            weight, bias = self.weights[at[0]], None if at[1] < 0 else self.weights[at[1]]
            after = backs[len(layers) + 1] if len(layers) + 1 < len(backs) else None
            out = weight.new_empty(self.width, len(weight[0]), batch) if after is None else torch.empty_like(after)
            layers.append(_Layer(weight, bias, at, out, out if after is None else after.transpose(1, 2), backs[len(layers)]))
        return layers


def _known(targets: Tensor, classes: int) -> int:
    """0 if all targets (T, W, 1, B) are among the ``classes``; else the first step of which one is not, which will then raise."""
    low, high = torch.aminmax(targets)
    if low >= 0 and high < classes:
        return 0
    return int(((targets < 0) | (targets >= classes)).flatten(1).any(1).int().argmax())


def _forward(layers: Sequence[_Layer], inputs: Tensor, logs: Tensor, hot: Tensor) -> None:
    """Log-probabilities into ``logs`` (W, K, B), and into the last layer's ``slope`` that of the summed losses; ``hot`` (W, K, B) is 1 at the targets."""
    entering, last = inputs, layers[-1]
    for layer in layers[:-1]:
        turned = layer.weight.transpose(1, 2)
        if layer.bias is None:
            torch.bmm(entering, turned, out=layer.out)
        else:
            torch.baddbmm(layer.bias[:, None], entering, turned, out=layer.out)
        entering = layer.out.relu_() if layer.rectified else layer.out
    if last.bias is None:
        torch.bmm(last.weight, entering.transpose(1, 2), out=last.out)
    else:
        torch.baddbmm(last.bias[:, :, None], last.weight, entering.transpose(1, 2), out=last.out)
    torch.log_softmax(last.out, 1, out=logs)
    torch.exp(logs, out=last.slope).sub_(hot)


def _backwards(layers: Sequence[_Layer], inputs: Tensor) -> Iterator[tuple[_Layer, Tensor]]:
    """The layers, last to first, each with what entered it, when its own slope and that behind it are there; after that its weights may change."""
    for depth in reversed(range(len(layers))):
        layer, entering = layers[depth], layers[depth - 1].out if depth else inputs
        if layer.back is not None:
            torch.bmm(layer.slope.transpose(1, 2), layer.weight, out=layer.back)
            if layers[depth - 1].rectified:  # a product with booleans would first convert them
                torch.ops.aten.threshold_backward.grad_input(layer.back, entering, 0.0, grad_input=layer.back)
        yield layer, entering
