"""Losses of models that learn online, each example tested on before it is learned (prequential; Dawid 1984): real streams to watch.

Tables are read from ``../shared/data/streams``. A table drawn with replacement is a stream without drift, into which a change can be
planted at a known tick; in its own order it drifts as it does.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.study import Skipped

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Example = tuple[Array, Labels]  # x (R, d) and y (R,) in {0, 1}: one example for each of R models

# R models, d features
TABLES = {"elec": "elec.csv", "weather": "weather.csv", "SEA": "sea_stream.csv"}
_LEAST = 1e-3  # probability kept for a class that a model rules out, so that no loss is beyond 6.9 and none next to 0 sets the log scale


class Model(Protocol):
    """``R`` models side by side."""

    def probability(self, x: Array) -> Array:
        """Of class 1 (R,), for ``x`` (R, d)."""
        ...

    def learn(self, x: Array, y: Labels) -> None:
        """One example for each model."""
        ...


class OnlineLogistic:
    """Logistic regression by stochastic gradient steps of a constant ``rate``, on features standardised by running moments."""

    def __init__(self, models: int, features: int, rate: float = 0.05) -> None:
        self.weights, self.rate = np.zeros((models, features + 1)), rate
        self.count, self.mean, self.square = 0, np.zeros((models, features)), np.zeros((models, features))

    def probability(self, x: Array) -> Array:
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * (self.weights * self._inputs(x)).sum(axis=1)))

    def learn(self, x: Array, y: Labels) -> None:
        self.weights += self.rate * (y - self.probability(x))[:, None] * self._inputs(x)
        self.count += 1
        away = x - self.mean
        self.mean += away / self.count
        self.square += away * (x - self.mean)

    def _inputs(self, x: Array) -> Array:
        deviation = np.sqrt(self.square / max(self.count - 1, 1))
        scaled = np.divide(x - self.mean, deviation, out=np.zeros_like(x), where=deviation > 0)
        return np.column_stack((np.clip(scaled, -5.0, 5.0), np.ones(len(x))))


class OnlineNaiveBayes:
    """Gaussian naive Bayes from running moments of each class; variances start at 1, as if one value had been seen."""

    def __init__(self, models: int, features: int) -> None:
        self.count = np.ones((models, 2))
        self.mean, self.square = np.zeros((models, 2, features)), np.ones((models, 2, features))

    def probability(self, x: Array) -> Array:
        variance = self.square / self.count[:, :, None]
        fit = -0.5 * ((x[:, None] - self.mean) ** 2 / variance + np.log(variance)).sum(axis=2) + np.log(self.count)
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * (fit[:, 1] - fit[:, 0])))

    def learn(self, x: Array, y: Labels) -> None:
        rows = np.arange(len(x))
        self.count[rows, y] += 1
        away = x - self.mean[rows, y]
        self.mean[rows, y] += away / (self.count[rows, y] - 1)[:, None]
        self.square[rows, y] += away * (x - self.mean[rows, y])


def prequential(model: Model, examples: Iterable[Example]) -> tuple[Array, Array]:
    """Cross-entropy losses in nats and errors, 0 or 1, both (T, R), of a model that meets ``examples`` one after the other."""
    losses, errors = [], []
    for x, y in examples:
        p = np.clip(model.probability(x), _LEAST, 1.0 - _LEAST)
        losses.append(-np.log(np.where(y == 1, p, 1.0 - p)))
        errors.append((p >= 0.5) != (y == 1))
        model.learn(x, y)
    return np.array(losses), np.array(errors, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Table:
    """Examples ``x`` (n, d) and labels ``y`` (n,) in their order."""

    x: Array
    y: Labels

    @classmethod
    def read(cls, name: str) -> "Table":
        """One of ``TABLES``. Raises :class:`experiments.study.Skipped` where the files are absent."""
        root = os.environ.get("FEDSIM_DATA")
        path = (Path(root) if root else Path(__file__).parents[2] / "shared" / "data") / "streams" / TABLES[name]
        if not path.is_file():
            raise Skipped(f"{path.parent} holds no {path.name}; set FEDSIM_DATA to the folder that holds streams/")
        rows = np.loadtxt(path, delimiter=",", skiprows=1)
        return cls(rows[:, :-1], rows[:, -1].astype(np.int64))

    def in_order(self) -> Iterator[Example]:
        """The stream as it is, for one model."""
        return ((self.x[t : t + 1], self.y[t : t + 1]) for t in range(len(self.y)))

    def drawn(
        self, rng: np.random.Generator, models: int, ticks: int, change: "Change | None" = None, at: int | None = None
    ) -> Iterator[Example]:
        """Examples drawn with replacement, so without drift; those from tick ``at`` on (counted from 0) are changed."""
        for tick in range(ticks):
            pick = rng.integers(len(self.y), size=models)
            x, y = self.x[pick], self.y[pick]
            yield change(rng, x, y) if change is not None and at is not None and tick >= at else (x, y)


Change = Callable[[np.random.Generator, Array, Labels], Example]


def noisy_labels(share: float) -> Change:
    """A ``share`` of the labels swapped."""

    def change(rng: np.random.Generator, x: Array, y: Labels) -> Example:
        return x, np.where(rng.random(len(y)) < share, 1 - y, y)

    return change


def swapped_features(first: int, second: int) -> Change:
    """Two columns exchanged, as when sensors are connected the wrong way round."""

    def change(rng: np.random.Generator, x: Array, y: Labels) -> Example:
        x = x.copy()
        x[:, [first, second]] = x[:, [second, first]]
        return x, y

    return change


def moved_boundary(least: float, most: float) -> Change:
    """SEA's concept drift: the sum of the first two features that separates the classes moves from one end of an interval to the other, so
    labels between the two are swapped."""

    def change(rng: np.random.Generator, x: Array, y: Labels) -> Example:
        total = x[:, 0] + x[:, 1]
        return x, np.where((total > least) & (total <= most), 1 - y, y)

    return change
