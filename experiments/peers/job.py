"""The job that all engines run: the same data, initial model, cohorts, batches in the same order, rate and precision."""

# C clients, n of a cohort, T local steps, B examples of a batch

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from fedsim.communication import Uniform
from fedsim.fleet import Fleet
from fedsim.local_training import example_order
from fedsim.parameters import Layout
from fedsim.randomness import rng_for, torch_seeded
from fedsim.rounds import Training
from fedsim.runtime.executor import Executor
from fedsim.shards import Shards
from fedsim.strategies import FedAvg
from fedsim.tasks.base import Dataset, Splits, Task
from fedsim.tasks.models import mlp

Vector = NDArray[np.float32]
Model = Literal["mlp", "cnn"]


@dataclass(frozen=True, kw_only=True)
class Pictures(Task):
    """Random class means plus noise, flat or as pictures of ``side`` pixels with ``channels``; a perceptron or a small CNN of ``width`` filters."""

    model: Model
    num: int
    side: int = 8
    channels: int = 1
    width: int = 8
    num_classes: int = 10

    def load(self) -> Splits:
        rng = np.random.default_rng(0)
        size = self.channels * self.side**2
        labels = rng.integers(0, 10, self.num + 1000)
        inputs = (rng.standard_normal((10, size))[labels] + 2.0 * rng.standard_normal((len(labels), size))).astype(np.float32)
        if self.model == "cnn":
            inputs = inputs.reshape(-1, self.channels, self.side, self.side)
        return Splits(Dataset(inputs[: self.num], labels[: self.num]), Dataset(inputs[self.num :], labels[self.num :]))

    def build(self, seed: int) -> nn.Module:
        with torch_seeded(seed, "model"):
            if self.model == "mlp":
                return mlp((self.side**2, 64, 10))
            w, last = self.width, 2 * self.width * (self.side // 4) ** 2
            return nn.Sequential(
                nn.Conv2d(self.channels, w, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(w, 2 * w, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(last, 64),
                nn.ReLU(),
                nn.Linear(64, 10),
            )


@dataclass(frozen=True, kw_only=True)
class Job:
    """``clients`` of ``examples`` each; every round a cohort takes ``steps`` local steps of plain SGD on batches of ``batch``."""

    name: str
    model: Model
    clients: int = 200
    cohort: int = 50
    examples: int = 100
    steps: int = 5
    batch: int = 20
    rate: float = 0.1
    rounds: int = 20
    side: int = 8
    channels: int = 1
    width: int = 8
    seed: int = 0

    @cached_property
    def task(self) -> Pictures:
        return Pictures(model=self.model, num=self.clients * self.examples, side=self.side, channels=self.channels, width=self.width)

    @cached_property
    def shards(self) -> Shards:
        return Shards(np.arange(self.clients * self.examples), np.arange(self.clients + 1) * self.examples)

    def cohort_of(self, round: int) -> NDArray[np.int64]:
        """Clients (n,), ascending."""
        return np.sort(rng_for(self.seed, "cohort", round).choice(self.clients, self.cohort, replace=False))

    def order(self, round: int, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """Examples (n, T, B) of every step."""
        return example_order(self.seed, self.shards, clients, round, (0, self.steps), self.batch)

    def initial(self) -> Vector:
        """The model's parameters before the first round."""
        model = self.task.build(self.seed)
        vector: Vector = Layout.of(model).flatten(model).astype(np.float32)
        return vector

    def test_loss(self, params: Vector) -> float:
        model = self.task.build(self.seed)
        Layout.of(model).load(model, params)
        data = self.task.data().test
        with torch.no_grad():
            return float(F.cross_entropy(model(torch.from_numpy(data.inputs)), torch.from_numpy(data.targets)))

    def training(self, executor: Executor, lanes: int | None = None, device: Literal["cpu", "cuda"] = "cpu") -> Training:
        """The job on fedsim."""
        columns = dict.fromkeys(("flops", "memory", "up", "down"), np.full(self.clients, 1e9))
        return Training.prepare(
            task=self.task,
            fleet=Fleet.from_table(columns, partition=InOrder(self.examples)),
            strategy=FedAvg(client_lr=self.rate, cohort=self.cohort, local_steps=self.steps, batch_size=self.batch),
            communication=Uniform(),
            rounds=10**9,
            seed=self.seed,
            executor=executor,
            lanes=lanes,
            device=device,
            evaluate_every=10**9,  # no engine reads the test split
        )


@dataclass(frozen=True)
class InOrder:
    """Every client holds the next ``size`` examples."""

    size: int
    key: str | None = None

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        return Shards(np.arange(len(dataset)), np.arange(num_clients + 1) * self.size)


JOBS: tuple[Job, ...] = (
    Job(name="MLP", model="mlp"),
    Job(name="pictures 8x8", model="cnn", cohort=25, examples=40, steps=2, rounds=10),
    Job(name="pictures 32x32", model="cnn", side=32, channels=3, width=16, clients=50, cohort=10, examples=40, steps=2, rounds=3),
    Job(
        name="pictures 32x32, cohort 40", model="cnn", side=32, channels=3, width=16, clients=50, cohort=40, examples=40, steps=2, rounds=3
    ),
)


def named(name: str) -> Job:
    """The job of :data:`JOBS` with this name."""
    return next(job for job in JOBS if job.name == name)
