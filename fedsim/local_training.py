"""What a worker does in a round: the local steps of a unit's clients between merges, and the merges that concern only them.

A client's batch at a step is a function of (seed, client, round, step) alone, never of the schedule: concatenated permutations
of its shard, cut into batches of exactly ``batch_size``, wrapping over the end of a pass.
"""

# n clients of a unit, k its sync points, T local steps, B examples of a batch, P parameters, S + S' scalars a client keeps

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fedsim.dense import DenseBlock, is_dense
from fedsim.errors import ClientError, DivergedError, FedsimError
from fedsim.lanes import Block, LaneBlock, LoopBlock, StepError, for_loop, pooled_first
from fedsim.mounted import Examples, mounted
from fedsim.parameters import Layout
from fedsim.randomness import permutations
from fedsim.runtime.batching import blocks
from fedsim.shards import Shards
from fedsim.stacked import StackedBlock, is_stacked
from fedsim.strategies import Due, Strategy
from fedsim.tasks.base import Dataset, Task
from fedsim.updates import Partial, Vector, fold, mean, spread, tree_sum
from fedsim.uploads import Sender, Sizes

Rows = NDArray[np.int64]
_COLUMNS = 61


@dataclass(frozen=True, eq=False)
class Shape:
    """One model shape as workers train it: its task, its sizes, and which ``coordinates`` (Q,) of the whole model it holds; ``None``: all."""

    task: Task
    sizes: Sizes
    coordinates: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """Clients (n,) train from the model shared as ``model`` at step ``start`` to ``points[-1]``; at the points before it they merge among themselves.

    ``draws`` (n,): the number by which each client's batches are drawn, the round's. ``steps`` (n,): local steps of the whole round, after which a client idles. ``weights`` (k, n): each client's normalised weight at each
    point, ``shares`` (k,): the clients' share of the fleet's weight. ``server``: name of the server's model, used by merges. ``carry`` (n, P): momenta.
    ``memory`` (n, S + S'): what clients keep from merge to merge.
    """

    seed: int
    round: int
    draws: NDArray[np.int64]
    shape: int
    clients: Rows
    steps: NDArray[np.int64]
    lanes: int
    model: str
    server: str
    start: int
    points: tuple[int, ...]
    weights: NDArray[np.float64]
    shares: NDArray[np.float64]
    carry: Vector | None
    memory: Vector | None
    last: int

    def __str__(self) -> str:
        return (
            f"clients {', '.join(map(str, self.clients.tolist()))} in round {self.round}, local steps {self.start + 1} to {self.points[-1]}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """A unit's node of the fold at its last point, the sum of each client's losses (n,), the server's model and state after its own merges.

    ``carry`` (n, P) and ``memory`` (n, S + S') go on from here; ``blocks`` (n,) is the digest of each client's block in that fold.
    """

    node: Partial
    losses: NDArray[np.float64]
    merged: tuple[Vector, Any] | None
    carry: Vector | None
    memory: Vector | None
    blocks: NDArray[np.str_]


def train_unit(unit: Unit, shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> Outcome:
    """Train a unit. Shared: ``shapes``, ``train`` (Dataset), ``shards``, ``strategy``, ``device`` (the CPU if there is none), ``state`` (the server's) and models (P,) by name.

    Raises ``DivergedError`` for a loss or a parameter that is not finite, and ``ClientError`` from an exception of user code.
    """
    strategy: Strategy = shared["strategy"]
    shape: Shape = shared["shapes"][unit.shape]
    team = _team(unit, shape.task, shared, cache)
    rows = example_order(unit.seed, shared["shards"], unit.clients, unit.draws, (unit.start, unit.points[-1]), strategy.batch_size)
    model, params, state = shared[unit.model], shared[unit.server], shared["state"]
    at, memory, examples = unit.start, unit.memory, mounted(shared["train"], torch.device(shared.get("device", "cpu")), cache)
    for point, weights, share in zip(unit.points, unit.weights, unit.shares, strict=True):
        leg = _Leg(unit, examples, strategy, shape, state, model, memory, weights, (at, point))
        nodes, memory = leg.run(team, rows[:, at - unit.start : point - unit.start])
        node = tree_sum(nodes)
        if point != unit.points[-1]:
            due = Due(unit.clients, weights, float(share))
            params, state = strategy.server(params, state, mean(node, params), due, point == unit.last)
            model = params
        at = point
    carries = [block.carry() for _, block in team] if at < unit.last else [None]
    return Outcome(
        node=node,
        losses=np.concatenate([block.losses for _, block in team]),
        merged=(params, state) if len(unit.points) > 1 else None,
        carry=None if carries[0] is None else np.concatenate([c for c in carries if c is not None]),
        memory=memory,
        blocks=np.repeat([_digest(n) for n in nodes], [len(block.clients) for _, block in team]),
    )


def example_order(seed: int, shards: Shards, clients: Rows, round: ArrayLike, steps: tuple[int, int], batch_size: int) -> Rows:
    """Examples (n, T, B), as indices into the data set, of the local steps ``steps[0]`` (inclusive, from 0) to ``steps[1]``.

    ``round`` is that of all clients, or a number for each (n,).
    """
    sizes = shards.sizes[clients]
    wanted = np.arange(steps[0] * batch_size, steps[1] * batch_size)
    if wanted[-1] < sizes.min():
        order = permutations(seed, "batches", clients, round, sizes)[:, wanted]
    else:
        order = _over_passes(seed, clients, round, sizes, wanted)
    examples: Rows = shards.examples(clients, order)
    return examples.reshape(len(clients), steps[1] - steps[0], batch_size)


def _over_passes(seed: int, clients: Rows, round: ArrayLike, sizes: Rows, wanted: Rows) -> Rows:
    """Places (n, k) in their shards of the draws number ``wanted`` (k,), each pass over a shard in an order of its own."""
    passes, place = np.divmod(wanted[None, :], sizes[:, None])
    order, rounds = np.empty((len(clients), len(wanted)), np.int64), np.broadcast_to(round, clients.shape)
    for number in range(int(passes.min()), int(passes.max()) + 1):
        rows, columns = np.nonzero(passes == number)
        taking, row = np.unique(rows, return_inverse=True)
        shuffled = permutations(seed, "batches", clients[taking], rounds[taking], sizes[taking], part=number)
        order[rows, columns] = shuffled[row, place[rows, columns]]
    return order


Team = Sequence[tuple[slice, Block]]


def _team(unit: Unit, task: Task, shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> Team:
    """The unit's blocks, each with its part of the unit's clients."""
    strategy = shared["strategy"]
    model, layout = _model(unit, task, torch.device(shared.get("device", "cpu")), cache)
    program = pooled_first(task, model) if unit.lanes == 1 else model
    team: list[tuple[slice, Block]] = []
    for low, high in blocks(len(unit.clients), unit.lanes):
        clients, carry = unit.clients[low:high], None if unit.carry is None else unit.carry[low:high]
        if unit.lanes == 1:
            block: Block = LoopBlock(task, model, program, strategy, layout, int(clients[0]), carry, unit.seed, int(unit.draws[low]))
        else:
            block = _lane_block(task, model, shared["train"])(task, model, strategy, layout, clients, carry, unit.lanes)
        team.append((slice(low, high), block))
    return team


def _lane_block(task: Task, model: torch.nn.Module, dataset: Dataset) -> type[LaneBlock]:
    """The program that computes the task's lanes fastest."""
    if is_dense(task, model, dataset):
        return DenseBlock
    return StackedBlock if is_stacked(task, model, dataset) else LaneBlock


def _model(unit: Unit, task: Task, device: torch.device, cache: MutableMapping[Any, Any]) -> tuple[torch.nn.Module, Layout]:
    """A model of the task to train in; kept, for each shape, while the worker sees the same task."""
    key = ("local model", unit.shape, unit.lanes == 1, device)
    kept = cache.get(key)
    if kept is None or kept[0] is not task or kept[1] != unit.seed:
        model = task.build(unit.seed).train().to(device)
        if unit.lanes == 1:
            model = for_loop(model)
        kept = cache[key] = (task, unit.seed, model, Layout.of(model))
    return kept[2], kept[3]


@dataclass(frozen=True, eq=False)
class _Leg:
    """A unit's way over the local ``steps`` from one merge to the next, from the handed-out ``model`` (P,) under the server's state."""

    unit: Unit
    examples: Examples
    strategy: Strategy
    shape: Shape
    server: Any
    model: Vector
    memory: Vector | None
    weights: NDArray[np.float64]
    steps: tuple[int, int]

    def run(self, team: Team, rows: Rows) -> tuple[list[Partial], Vector | None]:
        """Every block's node of the fold, and what the clients keep (n, S + S'), after the steps on ``rows`` (n, T, B)."""
        held = self.shape.coordinates
        start = torch.tensor(self.model if held is None else self.model[held])
        sent = []
        with _reproducible(team[0][1].device):
            for part, block in team:
                self._train(block, start, part, rows[part])
                sent.append(self._send(block, start, part))
        kept = [memory for _, memory in sent if memory is not None]
        return [node for node, _ in sent], np.concatenate(kept) if kept else None

    def _train(self, block: Block, start: torch.Tensor, part: slice, rows: Rows) -> None:
        low, high = self.steps
        block.load(start, self._shift(part))
        active = self.unit.steps[part] > np.arange(low, high)[:, None]
        try:
            losses = block.train(self.examples, rows, low, active)
        except StepError as error:
            _blame(self.unit, block, self.examples, rows[:, error.step], low + error.step, error.__cause__)
        found = losses[:, : len(block.clients)].double().cpu().numpy()
        if not active.all():
            found = np.where(active, found, 0.0)
        _check_losses(self.unit, block, found, low)
        block.losses += found.sum(0)

    def _shift(self, part: slice) -> torch.Tensor | None:
        kept = self.shape.sizes.strategy
        if not kept:
            return self.strategy.shift(torch.empty(part.stop - part.start, 0), self.server)
        assert self.memory is not None
        return self.strategy.shift(torch.tensor(self.memory[part, :kept]), self.server)

    def _send(self, block: Block, start: torch.Tensor, part: slice) -> tuple[Partial, Vector | None]:
        unit, (low, high) = self.unit, self.steps
        sender = Sender(self.strategy, self.shape.sizes, block.clients, unit.seed, unit.draws[part], high)
        taken = np.minimum(unit.steps[part], high) - low
        rows, memory = sender.send(start, block.ends().cpu(), taken, None if self.memory is None else self.memory[part], self.server)
        node = fold(rows.numpy(), self.weights[part])
        if not (np.isfinite(node.total.sum()) or np.isfinite(node.total).all()):  # the sum of finite numbers may overflow
            client = int(block.clients[np.argmin(rows.isfinite().all(1).numpy())])
            raise DivergedError("parameters are not finite", client=client, round=unit.round, step=high)
        held = self.shape.coordinates
        return node if held is None else spread(node, held, len(self.model)), memory


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Random states are put back after the block; a GPU computes in full precision, by kernels that add in a fixed order."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.random.fork_rng(devices=[device]), exact:
        yield


def _digest(node: Partial) -> str:
    """A checksum of the node's bits: sums of words by column, so that it costs a pass through memory, then a hash of these."""
    data = np.ascontiguousarray(node.total).view(np.uint8)
    whole = len(data) // (8 * _COLUMNS) * (8 * _COLUMNS)
    sums = data[:whole].view(np.uint64).reshape(-1, _COLUMNS).sum(0)
    return hashlib.sha1(sums.tobytes() + data[whole:].tobytes(), usedforsecurity=False).hexdigest()[:16]


def _blame(unit: Unit, block: Block, examples: Examples, rows: Rows, index: int, cause: BaseException | None) -> NoReturn:
    """Raise what a step's exception means to its user: the client whose examples raise it, or a model that cannot train as lanes."""
    if isinstance(cause, FedsimError):
        raise cause
    client = int(block.clients[0]) if len(block.clients) == 1 else _culprit(block, examples, rows)
    if client is None:
        message = f"the model cannot train {len(block.clients)} clients as one program ({cause}); set lanes=1 to train them one at a time"
        raise FedsimError(message) from cause
    raise ClientError(f"{type(cause).__name__}: {cause}", client=client, round=unit.round, step=index + 1) from cause


def _culprit(block: Block, examples: Examples, rows: Rows) -> int | None:
    """The first client of a batched block whose own examples raise."""
    assert isinstance(block, LaneBlock)
    for lane, client in enumerate(block.clients):
        try:
            block.alone(examples, rows[lane], lane)
        except Exception:
            return int(client)
    return None


def _check_losses(unit: Unit, block: Block, losses: NDArray[np.float64], at: int) -> None:
    finite = np.isfinite(losses)
    if not finite.all():
        step, lane = np.argwhere(~finite)[0]
        raise DivergedError(f"the loss is {losses[step, lane]}", client=int(block.clients[lane]), round=unit.round, step=int(at + step + 1))
