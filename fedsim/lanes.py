"""Programs that run local steps: one client on the plain autograd loop, or several at once as the lanes of one batched program.

A batched program stacks the clients' parameters, maps the task's losses over the stack with ``torch.func.vmap``, and
differentiates the sum: lanes do not mix, so each gets its own gradient. The loop is the reference. Where dispatch dominates (small
models) lanes are many times faster; large convolutions are faster alone.
"""

# W lanes, B examples of a batch, P parameters

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsim.mounted import Examples
from fedsim.parameters import Layout
from fedsim.randomness import rng_for
from fedsim.runtime.batching import padded
from fedsim.strategies import Strategy
from fedsim.tasks.base import Batch, Task
from fedsim.updates import Vector

Rows = NDArray[np.int64]
_PLAIN = (nn.Linear, nn.Flatten, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.LayerNorm)
_PICTURES = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.GroupNorm)
_SMALL_PICTURE, _TINY_PICTURE = 16, 8
_CACHE_BYTES = 4 * 2**20


def lanes_for(task: Task, model: nn.Module, batch: Batch, device: str = "cpu") -> int:
    """Width of the blocks by rule, never by timing: up to 64 for linear models, 32 for convolutions on pictures up to 8 x 8, 16 up to 16 x 16, else 1 (the loop).

    Narrower, down to 8, while the stacked parameters exceed 4 MiB, because then they fall out of a core's cache. On "cuda", where launching dominates
    everywhere, 64 for linear models and 32 for convolutions.
    """
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    owners = [m for m in model.modules() if m not in leaves and any(True for _ in m.parameters(recurse=False))]
    small = batch.inputs.ndim == 4 and (device == "cuda" or max(batch.inputs.shape[-2:]) <= _SMALL_PICTURE)
    if owners or not all(isinstance(m, _PLAIN + (_PICTURES if small else ())) for m in leaves):
        return 1
    if why_not_batched(task, model, batch) is not None:
        return 1
    widest = 64
    if any(isinstance(m, nn.Conv2d) for m in leaves):
        widest = 32 if device == "cuda" or max(batch.inputs.shape[-2:]) <= _TINY_PICTURE else 16
    if device == "cuda":
        return widest
    fitting = [width for width in (8, 16, 32, 64) if width <= widest and width * Layout.of(model).bytes <= _CACHE_BYTES]
    return max(fitting, default=8)


def why_not_batched(task: Task, model: nn.Module, batch: Batch) -> Exception | None:
    """What stops the model's losses from being mapped over lanes (control flow on data, dropout, writes in place), or ``None``."""
    layout = Layout.of(model)
    views = layout.views(torch.from_numpy(np.tile(layout.flatten(model), (2, 1))))
    stacked = Batch(*(torch.stack([part, part]) for part in batch))
    known = type(task).losses is Task.losses  # cross entropy itself is known to work
    try:
        _mapped(_Logits(task, model) if known else _Objective(task, model))(dict(views), stacked.inputs, stacked.targets)
    except Exception as error:  # whatever user code and torch raise is the answer
        return error
    return None


class StepError(Exception):
    """Step number ``step`` of those a block was given raised its cause."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Block:
    """Clients that train together, and what they carry through a round: ``momenta`` and the sum of each one's losses (n,)."""

    def __init__(self, strategy: Strategy, layout: Layout, clients: Rows, carry: Vector | None):
        self.strategy, self.layout, self.clients = strategy, layout, clients
        self.losses = np.zeros(len(clients))
        self.weights: list[Tensor] = []
        self.momenta: list[Tensor] | None = None
        self._start: list[Tensor] = []
        self._shift: Sequence[Tensor | None] = [None] * len(layout.names)

    def load(self, start: Tensor, shift: Tensor | None) -> None:
        """Begin from ``start`` (P,) with every client; the local rule is given each one's ``shift`` (n, P)."""
        self._start = list(self.layout.views(start.to(self.device)).values())
        with torch.no_grad():
            for weight, value in zip(self.weights, self._start, strict=True):
                weight.copy_(value)

    @property
    def device(self) -> torch.device:
        """Where the model lies, and the clients train."""
        return self.weights[0].device

    def step(self, dataset: Examples, rows: Rows, index: int, active: NDArray[np.bool_] | None) -> Tensor:
        """One local step of the ``active`` clients (n,; ``None``: all) on the examples ``rows`` (n, B); each one's mean loss before it, (lanes,).

        ``index`` is the step's number in the round.
        """
        raise NotImplementedError

    def train(self, dataset: Examples, rows: Rows, low: int, active: NDArray[np.bool_]) -> Tensor:
        """Local steps from number ``low`` on, over examples ``rows`` (n, T, B), of the clients ``active`` (T, n) in each: mean losses (T, lanes).

        Raises ``StepError`` from whatever a step raises.
        """
        losses = []
        for t, taking in enumerate(active):
            try:
                losses.append(self.step(dataset, rows[:, t], low + t, None if taking.all() else taking))
            except Exception as error:
                raise StepError(t) from error
        return torch.stack(losses)

    def ends(self) -> Tensor:
        """Where the clients stand, (n, P)."""
        raise NotImplementedError

    def carry(self) -> Vector | None:
        """Momentum (n, P) to go on from after a merge elsewhere; ``None`` without momentum."""
        raise NotImplementedError

    def _descend(self, gradients: Sequence[Tensor], active: Tensor | None, lanes: bool) -> None:
        rule = self.strategy
        with torch.no_grad():
            directions = list(gradients)
            if type(rule).direction is not Strategy.direction or self._shift[0] is not None:
                directions = [rule.direction(*parts) for parts in zip(gradients, self.weights, self._start, self._shift, strict=True)]
            if rule.clip is not None:
                directions = _clipped(directions, rule.clip, lanes)
            if rule.weight_decay:
                directions = [d.add(w, alpha=rule.weight_decay) for d, w in zip(directions, self.weights, strict=True)]
            if rule.momentum:
                assert self.momenta is not None
                directions = [m.mul_(rule.momentum).add_(d) for m, d in zip(self.momenta, directions, strict=True)]
            if active is not None:
                directions = [d * active.view(-1, *[1] * (d.ndim - 1)) for d in directions]
            torch._foreach_add_(self.weights, directions, alpha=-rule.client_lr)


def for_loop(model: nn.Module) -> nn.Module:
    """``model`` with its filters laid out as the loop's pictures are."""
    laid_out: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return laid_out


def pooled_first(task: Task, model: nn.Module) -> nn.Module:
    """The same function with every max pooling moved before the ReLU that it follows: equal values and gradients, and the ReLU sees fewer of them.

    Shares its parameters with ``model``, which is given back where nothing moves, where hooks watch it, and where the task may look inside.
    """
    plain = type(model) is nn.Sequential and type(task).losses is Task.losses and type(task).logits is Task.logits
    layers = list(model) if plain and isinstance(model, nn.Sequential) else []
    if any(m._forward_hooks or m._forward_pre_hooks for m in layers):
        return model
    moved = list(layers)
    for i in range(1, len(moved)):
        pool = moved[i]
        if type(moved[i - 1]) is nn.ReLU and type(pool) is nn.MaxPool2d and not pool.return_indices:
            moved[i - 1], moved[i] = pool, moved[i - 1]
    return model if moved == layers else nn.Sequential(*moved).train(model.training)


class LoopBlock(Block):
    """One client on its own, in the parameters of a ``model`` of :func:`for_loop`, by a ``program`` that computes the same function with them.

    ``seed`` and ``round`` decide what dropout and the like draw, step by step.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        program: nn.Module,
        strategy: Strategy,
        layout: Layout,
        client: int,
        carry: Vector | None,
        seed: int,
        round: int,
    ):
        super().__init__(strategy, layout, np.array([client]), carry)
        self.task, self.model = task, program
        self._draws = int(rng_for(seed, "local", client, round).integers(1 << 62))
        parameters = dict(model.named_parameters())
        self.weights = [parameters[name] for name in layout.names]
        if strategy.momentum:
            zeros = torch.zeros(layout.size, dtype=self.weights[0].dtype, device=self.device)
            kept = zeros if carry is None else torch.tensor(carry[0], device=self.device)
            self.momenta = list(layout.views(kept).values())

    def load(self, start: Tensor, shift: Tensor | None) -> None:
        super().load(start, shift)
        if shift is not None:
            self._shift = list(self.layout.views(shift[0].to(self.device)).values())

    def step(self, dataset: Examples, rows: Rows, index: int, active: NDArray[np.bool_] | None) -> Tensor:
        if active is not None and not active[0]:
            return torch.zeros(1, device=self.device)
        (torch.cuda if self.device.type == "cuda" else torch.default_generator).manual_seed(self._draws + index)
        batch = dataset.batch(rows[0])
        if batch.inputs.ndim == 4:
            batch = batch._replace(inputs=batch.inputs.contiguous(memory_format=torch.channels_last))  # convolutions are faster on it
        loss = self.task.losses(self.model, batch).mean()
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)
        self._descend(gradients, None, lanes=False)
        return loss.detach()[None]

    def ends(self) -> Tensor:
        return torch.cat([w.detach().reshape(-1) for w in self.weights])[None]  # a copy: the model goes on to the next client

    def carry(self) -> Vector | None:
        if self.momenta is None:
            return None
        return torch.cat([m.reshape(-1) for m in self.momenta]).cpu().numpy()[None]


class LaneBlock(Block):
    """Several clients as lanes of one program, filled up with copies of the first that weigh nothing."""

    def __init__(self, task: Task, model: nn.Module, strategy: Strategy, layout: Layout, clients: Rows, carry: Vector | None, lanes: int):
        super().__init__(strategy, layout, clients, carry)
        self.width = self.width_of(len(clients), lanes)
        self._fill = np.concatenate([np.arange(len(clients)), np.zeros(self.width - len(clients), np.int64)])
        self._task, self._model = task, model
        dtype, device = getattr(torch, layout.dtype), next(model.parameters()).device
        self.weights = [torch.empty(self.width, *shape, dtype=dtype, device=device, requires_grad=True) for shape in layout.shapes]
        if strategy.momentum and carry is None:
            self.momenta = [torch.zeros_like(w, requires_grad=False) for w in self.weights]
        elif strategy.momentum:
            assert carry is not None
            self.momenta = [m.clone() for m in layout.views(torch.tensor(carry[self._fill], device=device)).values()]

    @staticmethod
    def width_of(count: int, lanes: int) -> int:
        """Lanes that a block of ``count`` clients computes, at most ``lanes``; so many that a client's bits do not depend on how many they are."""
        return padded(count, lanes)

    def load(self, start: Tensor, shift: Tensor | None) -> None:
        super().load(start, shift)
        if shift is not None:
            self._shift = list(self.layout.views(shift[self._fill].to(self.device)).values())

    def step(self, dataset: Examples, rows: Rows, index: int, active: NDArray[np.bool_] | None) -> Tensor:
        inputs, targets = dataset.batch(rows[self._fill].reshape(-1))
        lanes = (self.width, rows.shape[1])
        named = dict(zip(self.layout.names, self.weights, strict=True))
        losses = self._mapped(named, inputs.view(*lanes, *inputs.shape[1:]), targets.view(*lanes, *targets.shape[1:])).mean(1)
        gradients = torch.autograd.grad(losses.sum(), self.weights, allow_unused=True, materialize_grads=True)
        self._descend(gradients, self._lanes_of(active), lanes=True)
        return losses.detach()

    @cached_property
    def _mapped(self) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
        return _mapped(_Objective(self._task, self._model))

    def alone(self, dataset: Examples, rows: Rows, lane: int) -> None:
        """The losses of one lane on its examples ``rows`` (B,), outside the batched program: to see whether they raise."""
        named = {f"model.{name}": w.detach()[lane] for name, w in zip(self.layout.names, self.weights, strict=True)}
        functional_call(_Objective(self._task, self._model), named, (dataset.batch(rows),))

    def ends(self) -> Tensor:
        count = len(self.clients)
        return torch.cat([w.detach()[:count].reshape(count, -1) for w in self.weights], dim=1)

    def carry(self) -> Vector | None:
        if self.momenta is None:
            return None
        count = len(self.clients)
        return torch.cat([m[:count].reshape(count, -1) for m in self.momenta], dim=1).cpu().numpy()

    def _lanes_of(self, active: NDArray[np.bool_] | None) -> Tensor | None:
        """``active`` (n,) as a factor of each lane (W,)."""
        return None if active is None else torch.from_numpy(active[self._fill].astype(self.layout.dtype)).to(self.device)


class _Objective(nn.Module):
    """A task's losses as a module, so that its model's parameters can be replaced for a call."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch) -> Tensor:
        return self.task.losses(self.model, batch)


class _Logits(_Objective):
    """The part of them that the model has in it."""

    def forward(self, batch: Batch) -> Tensor:
        return self.task.logits(self.model, batch.inputs)


def _mapped(objective: _Objective) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """Losses (W, B) of stacked parameters (W, ...) on stacked inputs and targets (W, B, ...)."""

    def losses(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        named = {f"model.{name}": value for name, value in parameters.items()}
        result: Tensor = functional_call(objective, named, (Batch(inputs, targets),))
        return result

    mapped: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor] = vmap(losses, randomness="error")

    def batched(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        if inputs.device.type != "cpu":
            return mapped(parameters, inputs, targets)
        with sdpa_kernel(SDPBackend.MATH):  # vmap would run the CPU's fused attention lane by lane, and warn
            return mapped(parameters, inputs, targets)

    return batched


def _clipped(gradients: Sequence[Tensor], clip: float, lanes: bool) -> list[Tensor]:
    """Gradients scaled so that each client's norm over all parameters is at most ``clip``."""
    rows = [g.reshape(len(g), -1) if lanes else g.reshape(1, -1) for g in gradients]
    norms = torch.stack([torch.linalg.vector_norm(r, dim=1) for r in rows]).norm(dim=0)
    scale = (clip / (norms + 1e-6)).clamp(max=1.0)
    return [g * (scale.view(-1, *[1] * (g.ndim - 1)) if lanes else scale[0]) for g in gradients]
