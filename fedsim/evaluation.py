"""Loss and accuracy on held-out examples, in fixed batches, so that workers cannot change a digit."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from fedsim.parameters import Layout
from fedsim.runtime.executor import Executor
from fedsim.updates import Vector

BATCH = 256
BATCHES_PER_UNIT = 4

Spans = Sequence[tuple[int, int]]


def evaluate(executor: Executor, shared: Mapping[str, Any], params: Vector, examples: int, seed: int) -> tuple[float, float]:
    """Mean loss and mean ``correct`` of ``params`` (P,) on the shared ``task``'s ``test`` split."""
    spans = [(low, min(low + BATCH, examples)) for low in range(0, examples, BATCH)]
    units = [spans[i : i + BATCHES_PER_UNIT] for i in range(0, len(spans), BATCHES_PER_UNIT)]
    inputs = {"task": shared["task"], "test": shared["test"], "params": params, "seed": seed}
    sums = [pair for unit in executor.map(evaluate_unit, units, inputs) for pair in unit]
    return math.fsum(loss for loss, _ in sums) / examples, math.fsum(hits for _, hits in sums) / examples


def evaluate_unit(unit: Spans, shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> list[tuple[float, float]]:
    """Sums of loss and of ``correct`` over each span of test examples."""
    task, test = shared["task"], shared["test"]
    model = _model(task, shared["seed"], cache)
    Layout.of(model).load(model, shared["params"])
    with torch.no_grad():
        return [_sums(task, model, test, span) for span in unit]


def _sums(task: Any, model: torch.nn.Module, test: Any, span: tuple[int, int]) -> tuple[float, float]:
    batch = test.batch(range(*span))
    return float(task.losses(model, batch).double().sum()), float(task.correct(model, batch).double().sum())


def _model(task: Any, seed: int, cache: MutableMapping[Any, Any]) -> torch.nn.Module:
    """A model of the task to evaluate with; kept while the worker sees the same task."""
    kept = cache.get("evaluation model")
    if kept is None or kept[0] is not task or kept[1] != seed:
        kept = cache["evaluation model"] = (task, seed, task.build(seed).eval())
    model: torch.nn.Module = kept[2]
    return model
