"""One client's local training in a stored round, done again in this process, step by step, where a debugger can look."""

# P parameters, B examples of a batch

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.lanes import LoopBlock, for_loop, pooled_first
from fedsim.parameters import Layout
from fedsim.retracing import Part, Retraced, taken_apart
from fedsim.runs.run import Run
from fedsim.runs.schema import column
from fedsim.runs.text import aligned
from fedsim.runtime.executor import one_thread
from fedsim.updates import Vector


def replay(run: Run, *, round: int, client: int, breakpoint: bool = False) -> "Replay":
    """The local training of ``client`` in the stored ``round`` of ``run``, to be iterated step by step.

    Rounds are done again from the nearest stored model. With ``breakpoint``, the debugger opens before every step, with the client's model and batch.
    Raises ``ValueError`` for a round that was not trained and for a client that had no part in its merges.
    """
    retraced = Retraced(run)
    losses = _stored_losses(run, round, retraced.simulation.rounds)
    if client not in losses:
        raise ValueError(f"client {client} took no part in round {round}; its cohort was {', '.join(map(str, sorted(losses)))}")
    parts = [part.of(client) for part in taken_apart(retraced.local, retraced.before(round), [client])]
    if not parts:
        raise ValueError(f"nothing of client {client} was merged in round {round}: it was too slow or vanished")
    if retraced.local.strategy.asynchronous:
        parts = parts[-1:]  # who came back twice began anew
    return Replay(client=client, parts=tuple(parts), stored_loss=losses[client], stop=breakpoint)


@dataclass(frozen=True, eq=False)
class LocalStep:
    """Local step ``step`` of a round, from 0: the mean ``loss`` before it, the norm of its gradient, and the ``examples`` (B,) of its batch."""

    step: int
    loss: float
    gradient_norm: float
    examples: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """One client's round. Each iteration trains it anew, with the plain loop; ``parts`` are its ways from one merge to the next.

    ``stored_loss``: its mean loss over the round's steps, as the run has it.
    """

    client: int
    parts: tuple[Part, ...]
    stored_loss: float
    stop: bool = False

    def __iter__(self) -> Iterator[LocalStep]:
        return (step for step, _ in self._train())

    def table(self) -> str:
        """Trains the client: a row for each step, and how their mean loss compares with the stored one."""
        steps = list(self)
        rows = [[str(s.step), f"{s.loss:.6g}", f"{s.gradient_norm:.6g}", _first(s.examples)] for s in steps]
        mean = sum(s.loss for s in steps) / len(steps)
        return "\n".join(
            [aligned(["step", "loss", "gradient norm", "examples"], rows), f"mean loss {mean:.6g}, stored {self.stored_loss:.6g}"]
        )

    def start(self) -> Vector:
        """The model (P,) that the client was handed last in the round."""
        return self.parts[-1].model

    def end(self) -> Vector:
        """The client's model (P,) after its last step; trains it. Less :meth:`start`, its update."""
        block = [block for _, block in self._train()][-1]
        end: Vector = block.ends()[0].numpy()
        return end

    def _train(self) -> Iterator[tuple[LocalStep, "_Watched"]]:
        block = _Watched.of(self.parts[0])
        for part in self.parts:
            part.load(block)
            for step, examples in part.batches():
                yield self._step(block, part, step, examples), block

    def _step(self, block: "_Watched", part: Part, step: int, examples: NDArray[np.int64]) -> LocalStep:
        model, batch = block.model, part.data.batch(examples)  # for who looks from the debugger
        with one_thread(), torch.random.fork_rng(devices=[]):
            if self.stop:
                sys.breakpointhook()
            loss = block.step(part.data, examples[None], step, None)
        del model, batch
        return LocalStep(step, float(loss), block.norm, examples)


class _Watched(LoopBlock):
    """The plain loop, which keeps the norm of each gradient."""

    norm = float("nan")

    @classmethod
    def of(cls, part: Part) -> "_Watched":
        unit, task = part.unit, part.shared["shapes"][part.unit.shape].task
        model = for_loop(task.build(unit.seed).train())
        program = pooled_first(task, model)
        return cls(
            task, model, program, part.shared["strategy"], Layout.of(model), int(unit.clients[0]), None, unit.seed, int(unit.draws[0])
        )

    def _descend(self, gradients: Sequence[Tensor], active: Tensor | None, lanes: bool) -> None:
        self.norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        super()._descend(gradients, active, lanes)


def _first(examples: NDArray[np.int64], shown: int = 6) -> str:
    """``12 7 391 ... (16)``."""
    listed = " ".join(map(str, examples[:shown].tolist()))
    return listed if len(examples) <= shown else f"{listed} ... ({len(examples)})"


def _stored_losses(run: Run, round: int, rounds: int) -> dict[int, float]:
    """Each client's mean loss in a stored round of training."""
    table = run.clients()
    numbers, clients, losses = (column(table, name) for name in ("round", "client", "train_loss"))
    if not 0 <= round < rounds or round not in numbers:
        raise ValueError(
            f"round must be one of the stored rounds of training, 0 to {min(rounds, numbers.max(initial=-1) + 1) - 1}, got {round}"
        )
    return dict(zip(clients[numbers == round].tolist(), losses[numbers == round].tolist(), strict=True))
