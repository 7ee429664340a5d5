"""What submodels lose on the streams: computed for whole blocks of ticks on workers, kept for the block at hand as arrays over the fleet.

Few clients, or clients with submodels of their own, are evaluated one after the other. Many clients of one submodel are the
lanes of one program: each lane is a product of the same shape, aligned alike, so its bits do not depend on the others.

Exports: Ledger, LaneUnit, ServeUnit, serve_block, serve_lanes.
"""

# C clients, n of them asked, T ticks of a block, B examples a tick, W lanes, R rows of a lane

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsim.errors import DivergedError
from fedsim.runtime.batching import padded
from fedsim.runtime.executor import Executor
from fedsim.submodels import Variant, dense_model
from fedsim.tasks import Batch, Task

TICKS_PER_BLOCK = 25
ROWS = 16  # a lane's rows are a multiple: every lane then begins where kernels like memory to begin
LANES = 256
_CLIENTS_PER_UNIT, _LANES_PER_UNIT, _UNITS_AT_ONCE = 16, 4096, 64

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Memo = dict[Any, Any]


@dataclass(frozen=True, eq=False)
class ServeUnit:
    """Clients (n,) to serve for the ticks ``first`` .. ``first + num - 1``, with a variant each."""

    first: int
    num: int
    clients: tuple[int, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, eq=False)
class LaneUnit:
    """Clients (n,) to serve with one ``variant`` for the ticks ``first`` .. ``first + num - 1``, at most ``lanes`` at once."""

    first: int
    num: int
    clients: Ints
    variant: Variant
    lanes: int


def serve_block(unit: ServeUnit, shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> Floats:
    """Mean loss and accuracy a tick, (n, 2, T), one forward pass a client.

    Raises ``DivergedError`` naming the client whose loss is not finite (its "round" is the block's first tick).
    """
    dense, stream, task = dense_model(shared, cache), shared["stream"], shared["task"]
    results = np.empty((len(unit.clients), 2, unit.num))
    for row, (client, variant) in enumerate(zip(unit.clients, unit.variants, strict=True)):
        model = _Once(dense.cached_slice(variant, cache))
        inputs, targets = stream.draw(client, unit.first, unit.num)
        batch = Batch(torch.from_numpy(inputs.reshape(-1, *inputs.shape[2:])), torch.from_numpy(targets.reshape(-1, *targets.shape[2:])))
        with torch.no_grad():
            figures = torch.stack([task.losses(model, batch), task.correct(model, batch)]).double().numpy()
        results[row] = figures.reshape(2, unit.num, -1).mean(axis=2)
    _check_finite(results, np.array(unit.clients), unit.first)
    return results


def serve_lanes(unit: LaneUnit, shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> Floats:
    """As :func:`serve_block`, with clients as lanes of one program."""
    dense, stream, task = dense_model(shared, cache), shared["stream"], shared["task"]
    program = _Lanes(task, dense.cached_slice(unit.variant, cache))
    ticks = np.arange(unit.first, unit.first + unit.num)
    found = []
    for low in range(0, len(unit.clients), unit.lanes):
        clients = unit.clients[low : low + unit.lanes]
        inputs, targets = stream.draw_many(clients, ticks)
        found.append(program.figures(inputs, targets, padded(len(clients), unit.lanes)))
    results = np.concatenate(found)
    _check_finite(results, unit.clients, unit.first)
    return results


def _check_finite(results: Floats, clients: Ints, first: int) -> None:
    broken = ~np.isfinite(results[:, 0]).all(axis=1)
    if broken.any():
        raise DivergedError("the loss of a served batch is not finite", client=int(clients[np.argmax(broken)]), round=first)


class Ledger:
    """Figures of the fleet in the block of ticks at hand: of the submodel each client serves with, and of the ``whole`` model.

    ``shared`` is what units read, ``ticks`` the horizon, ``batch`` the examples a tick, ``lanes`` as in :class:`LaneUnit` (1: each client
    alone). ``memo`` keeps the figures of every block, by content, for others in the same ``world``; ``None``: only the last block is held.
    """

    def __init__(
        self,
        executor: Executor,
        shared: Mapping[str, Any],
        whole: Variant,
        num_clients: int,
        *,
        ticks: int,
        batch: int,
        lanes: int,
        memo: Memo | None,
        world: str,
    ):
        self._executor, self._shared, self._whole, self._memo, self._world = executor, shared, whole, memo, world
        self._horizon, self._lanes, self._ticks = ticks, lanes, ticks_per_block(batch, lanes)
        self._numbers = {whole.digest: 0}
        self._block = -1
        self._known = np.full((2, num_clients), -1)  # the variant, by number, that a client's figures are of
        self._figures: Floats | None = None  # (2, T, 2, C): a tick is read in one piece

    def at(self, tick: int, clients: Ints, variants: Sequence[Variant], index: Ints) -> Floats:
        """Loss and accuracy (2, 2, n) at ``tick`` of ``clients`` (n,): with ``variants[index]`` (n,), and with the whole model."""
        block, at = divmod(tick, self._ticks)
        if block != self._block:
            self._block = block
            self._known[:] = -1
        numbers = np.array([self._numbers.setdefault(v.digest, len(self._numbers)) for v in variants])
        self._complete(1, clients, (self._whole,), np.zeros(len(clients), np.int64), np.zeros(1, np.int64))
        served_whole = clients[(numbers[index] == 0) & (self._known[0, clients] != 0)]
        if len(served_whole):
            self._store(0, served_whole, self._held(1, served_whole))
            self._known[0, served_whole] = 0
        self._complete(0, clients, variants, index, numbers)
        return np.empty((2, 2, 0)) if self._figures is None else np.asarray(self._figures[:, at][..., clients])

    def _complete(self, row: int, clients: Ints, variants: Sequence[Variant], index: Ints, numbers: Ints) -> None:
        """See to it that ``row`` holds the figures of ``clients`` (n,) with ``variants[index]`` (n,)."""
        missing = np.flatnonzero(self._known[row, clients] != numbers[index])
        if not len(missing):
            return
        clients, index = clients[missing], index[missing]
        order = np.argsort(index, kind="stable")
        used, counts = np.unique(index, return_counts=True)
        groups = [(variants[v], clients[members]) for v, members in zip(used, np.split(order, np.cumsum(counts)[:-1]), strict=True)]
        unknown = [(variant, rest) for variant, members in groups if len(rest := self._recall(row, variant, members))]
        for members, figures in self._computed(unknown):
            self._store(row, members, figures)
        self._known[row, clients] = numbers[index]
        for variant, members in unknown:
            self._remember(row, variant, members)

    def _computed(self, groups: Sequence[tuple[Variant, Ints]]) -> Iterator[tuple[Ints, Floats]]:
        """Figures (n, 2, T) of groups of clients with a variant each, by unit; so many units at once that the fleet's are never there twice."""
        first = self._block * self._ticks
        num = min(self._ticks, self._horizon - first)
        units = _alone(groups, first, num) if self._lanes == 1 else _in_lanes(groups, first, num, self._lanes)
        for low in range(0, len(units), _UNITS_AT_ONCE):
            some = units[low : low + _UNITS_AT_ONCE]
            results = self._executor.map(serve_block if self._lanes == 1 else serve_lanes, some, self._shared)
            yield from ((np.array(unit.clients), figures) for unit, figures in zip(some, results, strict=True))

    def _store(self, row: int, clients: Ints, figures: Floats) -> None:
        """Write ``figures`` (n, 2, T) of ``clients`` (n,)."""
        if self._figures is None:
            self._figures = np.empty((2, min(self._ticks, self._horizon), 2, self._known.shape[1]), figures.dtype)
        self._figures[row, : figures.shape[2]][..., clients] = figures.transpose(2, 1, 0)

    def _held(self, row: int, clients: Ints) -> Floats:
        """Figures (n, 2, T) of ``clients`` (n,)."""
        assert self._figures is not None, "they were stored before"
        return np.asarray(self._figures[row][..., clients].transpose(2, 1, 0))

    def _recall(self, row: int, variant: Variant, clients: Ints) -> Ints:
        """Take over what the memo knows of ``clients`` (n,); those it does not know."""
        kept = None if self._memo is None else self._memo.get(self._key(variant))
        if kept is None:
            return clients
        known, figures = kept
        place = np.minimum(np.searchsorted(known, clients), len(known) - 1)
        there = known[place] == clients
        self._store(row, clients[there], figures[place[there]])
        return np.asarray(clients[~there])

    def _remember(self, row: int, variant: Variant, clients: Ints) -> None:
        if self._memo is None:
            return
        figures = self._held(row, clients)
        if (kept := self._memo.get(self._key(variant))) is not None:
            clients, figures = np.concatenate([kept[0], clients]), np.concatenate([kept[1], figures])
        order = np.argsort(clients)
        self._memo[self._key(variant)] = clients[order], figures[order]

    def _key(self, variant: Variant) -> Any:
        return self._world, variant.digest, self._block


def ticks_per_block(batch: int, lanes: int) -> int:
    """Ticks whose figures are computed together. Of a fleet in lanes, as many as fill a lane's rows: all clients' figures are held at once."""
    return TICKS_PER_BLOCK if lanes == 1 else max(1, ROWS // batch)


def _alone(groups: Sequence[tuple[Variant, Ints]], first: int, num: int) -> list[Any]:
    pairs = sorted(((client, variant) for variant, members in groups for client in members.tolist()), key=lambda pair: pair[0])
    chunks = [pairs[i : i + _CLIENTS_PER_UNIT] for i in range(0, len(pairs), _CLIENTS_PER_UNIT)]
    return [ServeUnit(first, num, tuple(c for c, _ in chunk), tuple(v for _, v in chunk)) for chunk in chunks]


def _in_lanes(groups: Sequence[tuple[Variant, Ints]], first: int, num: int, lanes: int) -> list[Any]:
    starts = [(variant, members, i) for variant, members in groups for i in range(0, len(members), _LANES_PER_UNIT)]
    return [LaneUnit(first, num, members[i : i + _LANES_PER_UNIT], variant, lanes) for variant, members, i in starts]


class _Lanes:
    """The figures of a model as a program over lanes, each of a multiple of ``ROWS`` rows."""

    def __init__(self, task: Task, model: nn.Module):
        self._objective = _Objective(task, model)
        self._parameters = {name: p.detach() for name, p in self._objective.named_parameters()}
        self._map = vmap(self._evaluate)

    def figures(self, inputs: NDArray[np.floating], targets: Ints, width: int) -> Floats:
        """Mean loss and accuracy (n, 2, T) of ``inputs`` (n, T, B, ...) and ``targets`` (n, T, B) in ``width`` >= n lanes."""
        n, num, batch = targets.shape[:3]
        parameters = {name: p.expand(width, *p.shape) for name, p in self._parameters.items()}
        with torch.no_grad():
            found = self._map(parameters, _padded(inputs, width), _padded(targets, width))
        figures = found[:n, :, : num * batch]
        exact = figures if batch == 1 else figures.double()  # the mean of one is itself, at half the memory
        return np.asarray(exact.numpy().reshape(n, 2, num, batch).mean(axis=3))

    def _evaluate(self, parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        figures: Tensor = functional_call(self._objective, parameters, (Batch(inputs, targets),))
        return figures


def _padded(values: NDArray[Any], width: int) -> Tensor:
    """``values`` (n, T, B, ...) as lanes (W, R, ...); what is filled up repeats the last row and the first lane."""
    n, rows = len(values), values.shape[1] * values.shape[2]
    flat = torch.from_numpy(values.reshape(n, rows, *values.shape[3:]))
    filled = torch.empty((width, -(-rows // ROWS) * ROWS, *flat.shape[2:]), dtype=flat.dtype)
    filled[:n, :rows], filled[:n, rows:] = flat, flat[:, -1:]
    filled[n:] = filled[:1]
    return filled


class _Objective(nn.Module):
    """Losses and hits (2, R) of a model on a batch."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch) -> Tensor:
        model = _Once(self.model)
        losses = self.task.losses(model, batch)
        return torch.stack([losses, self.task.correct(model, batch).to(losses.dtype)])


class _Once(nn.Module):
    """``model``, asked once for each input although loss and accuracy both need its output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.seen: tuple[Tensor, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a task may reach for parts of its model
            return getattr(super().__getattr__("model"), name)

    def forward(self, inputs: Tensor) -> Any:
        if self.seen is None or self.seen[0] is not inputs:
            self.seen = inputs, self.model(inputs)
        return self.seen[1]
