"""How many clients a second this machine trains at each lane width, for one simulation's model, strategy and data.

Widths decide bits, so nothing here chooses one: the line to put into the recipe is printed, and the user decides. Timings are paired: in every
repetition each width trains the same clients once, in an order that turns round, so a busy machine slows all alike.
"""

# n clients, T local steps, P parameters, S + S' scalars a client keeps

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.lanes import why_not_batched
from fedsim.local_training import Unit, train_unit
from fedsim.retracing import training_of
from fedsim.rounds import Training
from fedsim.runs.text import aligned, number
from fedsim.runtime.batching import power_of_two
from fedsim.runtime.serial import SerialExecutor

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

WIDTHS = (1, 4, 8, 16, 32, 64)
_FEWEST, _MOST = 5, 25
_CLEAR = 1.03  # a wider block must be faster by this to be worth its padding

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Timing:
    """Clients a second at a lane width, and their ratio to the loop's (width 1) in the same repetition: median, lowest, highest."""

    lanes: int
    clients_per_second: tuple[float, float, float]
    ratio: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Timings by width, the ``best`` of them, and the ``current`` one, that of the recipe as it stands. ``note`` says what could not be timed, and why."""

    timings: tuple[Timing, ...]
    best: int
    current: int
    repetitions: int
    clients: int
    steps: int
    note: str

    @property
    def line(self) -> str:
        """What to put into the recipe's ``Simulation``."""
        return f"lanes={self.best},"

    def table(self) -> str:
        """The timings, and the line to put into the recipe."""
        rows = [
            [str(t.lanes), number(t.clients_per_second[0]), _spread(t.clients_per_second), number(t.ratio[0]), _spread(t.ratio)]
            for t in self.timings
        ]
        header = ["lanes", "clients/s", "lowest to highest", "x loop", "lowest to highest"]
        about = f"{self.clients} clients, {self.steps} local steps each, {self.repetitions} repetitions, one thread"
        meant = min(self.current, self.timings[-1].lanes)  # a wider block than there are clients is one of all clients
        advice = (
            f"lanes={self.current} is what the recipe means already"
            if self.best == meant
            else f"fastest here; put into the recipe's Simulation: {self.line}   (it means {self.current} now; another width gives other last digits)"
        )
        return "\n".join(filter(None, [aligned(header, rows), about, advice, self.note]))


def tune(simulation: "Simulation", *, widths: Sequence[int] = WIDTHS, seconds: float = 20.0) -> Tuning:
    """Time local training at each of ``widths`` on one thread of this machine, for about ``seconds``.

    The clients are those of the first round, at most as many as the widest block holds; wider blocks than that are left out. Nothing is written.
    """
    if not widths or not seconds > 0:
        raise ValueError(f"need at least one width and a positive time, got {widths!r} and {seconds!r} seconds")
    asked = sorted({power_of_two(width, "widths") for width in widths} | {1})
    with SerialExecutor() as executor:
        training = training_of(simulation, executor)
        bench = Bench(training, first_clients(training)[: asked[-1]])
        fitting, note = _fitting(training, asked, len(bench.clients))
        once = {width: bench.seconds(width, 1) for width in fitting for _ in range(2)}  # the first also warms up; the second is kept
        whole = int(training.strategy.steps(training.shards.sizes[bench.clients]).max())
        steps = int(np.clip(seconds / (2 * _FEWEST * sum(once.values())), 1, whole))
        repetitions = int(np.clip(seconds / (steps * sum(once.values())), _FEWEST, _MOST))
        found = _interleaved(bench, fitting, steps, repetitions)
    rates = {width: _rates(bench, training, steps, found[width]) for width in fitting}
    timings = tuple(Timing(width, _figures(rates[width]), _figures(rates[width] / rates[1])) for width in fitting)
    return Tuning(
        timings=timings,
        best=_best(timings),
        current=training.lanes,
        repetitions=repetitions,
        clients=len(bench.clients),
        steps=steps,
        note=note,
    )


@dataclass(frozen=True, eq=False)
class Bench:
    """Local training of ``clients`` (n,) from the untrained model, to be timed."""

    training: Training
    clients: NDArray[np.int64]

    def seconds(self, lanes: int, steps: int) -> float:
        """Elapsed seconds of ``steps`` local steps of every client, in blocks of ``lanes``, with all that a worker does for them."""
        unit, shared = self.unit(lanes, steps), self.shared
        start = time.perf_counter()
        self.training.executor.map(train_unit, [unit], shared)
        return time.perf_counter() - start

    @property
    def shared(self) -> Mapping[str, Any]:
        """What the unit reads."""
        state = self.training.init()
        server = None if self.training.strategy.asynchronous else state.server
        return {**self.training.shared, "state": server, "model 0": state.params}

    def unit(self, lanes: int, steps: int) -> Unit:
        """The work as it is sent to a worker; every client holds the whole model."""
        n, memory = len(self.clients), self.training.shapes[0].trained.sizes.memory
        return Unit(
            seed=self.training.seed,
            round=0,
            draws=np.zeros(n, np.int64),
            shape=0,
            clients=self.clients,
            steps=np.full(n, steps),
            lanes=lanes,
            model="model 0",
            server="model 0",
            start=0,
            points=(steps,),
            weights=np.full((1, n), 1.0 / n),
            shares=np.ones(1),
            carry=None,
            memory=np.zeros((n, memory), self.training.layout.dtype) if memory else None,
            last=steps,
        )


def first_clients(training: Training) -> NDArray[np.int64]:
    """Clients (n,) that would train in the first round."""
    if training.strategy.asynchronous:
        return training.holders
    return training.draw(0, 0.0)[0]


def _fitting(training: Training, widths: Sequence[int], clients: int) -> tuple[list[int], str]:
    """The widths that can be timed, and a word on those that cannot."""
    task, train = training.task, training.data.train
    batch = train.batch(np.arange(training.strategy.batch_size) % len(train))
    if (reason := why_not_batched(task, task.build(training.seed).train(), batch)) is not None:
        why = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
        return [1], f"this model cannot train as lanes of one program ({why})"
    wide = [width for width in widths if width // 2 >= clients]
    note = f"left out: {', '.join(map(str, wide))}, wider than the {clients} clients of a round" if wide else ""
    return [width for width in widths if width not in wide], note


def _interleaved(bench: Bench, widths: Sequence[int], steps: int, repetitions: int) -> dict[int, Floats]:
    """Seconds (repetitions,) of each width; every repetition starts with the next one."""
    found = {width: np.empty(repetitions) for width in widths}
    for repetition in range(repetitions):
        shift = repetition % len(widths)
        for width in (*widths[shift:], *widths[:shift]):
            found[width][repetition] = bench.seconds(width, steps)
    return found


def _rates(bench: Bench, training: Training, steps: int, seconds: Floats) -> Floats:
    """Clients a second, each taking the local steps of a whole round."""
    whole = training.strategy.steps(training.shards.sizes[bench.clients]).sum()
    return np.asarray(len(bench.clients) / (seconds * whole / (steps * len(bench.clients))))


def _figures(values: Floats) -> tuple[float, float, float]:
    return float(np.median(values)), float(values.min()), float(values.max())


def _best(timings: Sequence[Timing]) -> int:
    """The narrowest width within a few percent of the fastest."""
    fastest = max(t.ratio[0] for t in timings)
    return min(t.lanes for t in timings if t.ratio[0] * _CLEAR >= fastest)


def _spread(figures: tuple[float, float, float]) -> str:
    return f"{number(figures[1])} to {number(figures[2])}"
