"""Lanes of small convolutional networks as one program of grouped convolutions.

The lanes' channels stand side by side, (B, W C, H, W'), so a convolution of all lanes is one grouped convolution, and pooling and
activations need not know of lanes at all. Autograd takes the backward pass. It equals :class:`fedsim.lanes.LaneBlock` up to rounding and spares the
transposes by which ``vmap`` comes and goes.
"""

# W lanes, B examples of a batch, C channels, F features

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.lanes import LaneBlock, Rows
from fedsim.mounted import Examples
from fedsim.tasks.base import Dataset, Task

_ANYWHERE = (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Identity)
_ON_CHANNELS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def is_stacked(task: Task, model: nn.Module, dataset: Dataset) -> bool:
    """Whether the grouped program computes this task: convolutions, group norms, pooling, then one flattening, then linear layers; cross entropy."""
    entropy = type(task).losses is Task.losses and type(task).logits is Task.logits
    if not entropy or type(model) is not nn.Sequential or dataset.inputs.ndim != 4:
        return False
    layers = list(model)
    cuts = [i for i, m in enumerate(layers) if type(m) is nn.Flatten and (m.start_dim, m.end_dim) == (1, -1)]
    if len(cuts) != 1 or len(set(map(id, layers))) < len(layers):
        return False
    pictures, vectors = layers[: cuts[0]], layers[cuts[0] + 1 :]
    known = all(type(m) in (*_ANYWHERE, *_ON_CHANNELS, nn.GroupNorm) or _plain(m) for m in pictures)
    known = known and all(type(m) in (*_ANYWHERE, nn.Linear) for m in vectors)
    trained = all(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in layers)
    return known and trained and any(type(m) is nn.Conv2d for m in pictures)


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class StackedBlock(LaneBlock):
    """See :func:`is_stacked`, which must hold."""

    def step(self, dataset: Examples, rows: Rows, index: int, active: NDArray[np.bool_] | None) -> Tensor:
        lanes, batch = self.width, rows.shape[1]
        inputs, targets = dataset.batch(rows[self._fill].T.reshape(-1))  # by example, then by lane
        logits = self._forward(inputs.view(batch, -1, *inputs.shape[2:]))
        losses = F.cross_entropy(logits.reshape(lanes * batch, -1), targets.view(batch, lanes).T.reshape(-1), reduction="none")
        losses = losses.view(lanes, batch).mean(1)
        gradients = torch.autograd.grad(losses.sum(), self.weights)
        self._descend(gradients, self._lanes_of(active), lanes=True)
        return losses.detach()

    def _forward(self, hidden: Tensor) -> Tensor:
        """Logits (W, B, K) of pictures (B, W C, H, W')."""
        named = dict(zip(self.layout.names, self.weights, strict=True))
        lanes = self.width
        for name, module in self._model.named_children():
            weight, bias = named.get(f"{name}.weight"), named.get(f"{name}.bias")
            if isinstance(module, nn.Conv2d):
                assert weight is not None
                stride, padding, dilation = module.stride, module.padding, module.dilation
                assert not isinstance(padding, str)
                hidden = F.conv2d(hidden, weight.flatten(0, 1), _flat(bias), stride, padding, dilation, lanes * module.groups)
            elif isinstance(module, nn.GroupNorm):
                hidden = F.group_norm(hidden, lanes * module.num_groups, _flat(weight), _flat(bias), module.eps)
            elif isinstance(module, nn.Flatten):
                hidden = hidden.reshape(len(hidden), lanes, -1).transpose(0, 1)
            elif isinstance(module, nn.Linear):
                assert weight is not None
                turned = weight.transpose(1, 2)
                hidden = torch.bmm(hidden, turned) if bias is None else torch.baddbmm(bias[:, None], hidden, turned)
            else:
                hidden = module(hidden)
        return hidden


def _flat(parameter: Tensor | None) -> Tensor | None:
    """(W, C) as (W C,)."""
    return None if parameter is None else parameter.flatten(0, 1)
