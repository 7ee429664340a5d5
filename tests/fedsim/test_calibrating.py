"""Calibration split over workers: the bits of one process, whatever the number of workers."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedsim as fs
from fedsim.calibrating import trajectory_on_workers
from fedsim.llm import Arithmetic, Decoder, Reasoning
from fedsim.llm.arithmetic import characters
from fedsim.pruning import GISP, FirstOrder, OneShot
from fedsim.tasks.base import Dataset, Splits, Task

TASK = Reasoning(
    problems=Arithmetic(number=60, words=1),
    model=Decoder(layers=2, width=32, heads=4, kv_heads=2, hidden=48),
    tokenizer=characters(),
    length=48,
)
PRUNER = GISP(levels=(0.5,), steps=4)


class Sum(nn.Module):
    """A residual stream of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.turn, self.leave = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.enter(inputs).relu()
        return self.leave(stream + self.turn(stream))


@dataclass(frozen=True)
class Residual(Task):
    num_classes = 2

    def load(self) -> Splits:
        inputs = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
        data = Dataset(inputs, (inputs[:, 0] > 0).astype(np.int64))
        return Splits(data, data)

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Sum()


def prepared(task=TASK):
    model, train = task.build(0).eval(), task.data().train
    return model, [train.batch(np.arange(i, i + 8)) for i in range(0, 40, 8)]


def test_one_process_with_units_gives_the_bits_of_one_without():
    model, batches = prepared()
    smap = TASK.structures(model)
    expected = PRUNER.trajectory(model, smap, TASK.losses, batches)
    with fs.SerialExecutor() as executor:
        assert trajectory_on_workers(PRUNER, TASK, model, batches, executor) == expected
        squares = FirstOrder(aggregate="sum_squares")
        once = OneShot(levels=(0.5,), importance=squares)
        assert trajectory_on_workers(once, TASK, model, batches, executor) == once.trajectory(model, smap, TASK.losses, batches)


@pytest.mark.slow
@pytest.mark.ray
def test_the_number_of_workers_changes_no_bit():
    model, batches = prepared()
    expected = PRUNER.trajectory(model, TASK.structures(model), TASK.losses, batches)
    for workers in (1, 2):
        with fs.RayExecutor(workers=workers) as executor:
            assert trajectory_on_workers(PRUNER, TASK, model, batches, executor) == expected


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [("float64", {}), ("float64", {"gradient_bytes": 1}), ("float32", {"compact": False}), ("float32", {"aggregate": "sum_squares"})],
)
def test_every_dtype_and_way_to_compute_gives_the_same_bits(dtype, fields):
    task = replace(TASK, model=replace(TASK.model, dtype=dtype))
    model, batches = prepared(task)
    pruner = replace(PRUNER, importance=FirstOrder(**fields))
    with fs.SerialExecutor() as executor:
        found = trajectory_on_workers(pruner, task, model, batches, executor)
    assert found == pruner.trajectory(model, task.structures(model), task.losses, batches)
    assert found == replace(PRUNER, importance=FirstOrder(**{**fields, "gradient_bytes": None})).trajectory(
        model, task.structures(model), task.losses, batches
    )


@pytest.mark.parametrize("compact", [None, True])
def test_a_residual_stream_is_pruned_as_in_one_process(compact):
    task = Residual()
    model, train = task.build(0), task.data().train
    batches = [train.batch(np.arange(i, i + 8)) for i in range(0, 32, 8)]
    importance = FirstOrder(aggregate="sum_abs", reduce="mean_then_abs", compact=compact)
    pruner = GISP(levels=(0.3,), steps=2, couple_residual=True, importance=importance)
    expected = pruner.trajectory(model, task.structures(model, couple_residual=True), task.losses, batches)
    assert len(expected.removed) > 2
    with fs.SerialExecutor() as executor:
        assert trajectory_on_workers(pruner, task, model, batches, executor) == expected


class Counting(fs.SerialExecutor):
    """Keeps how many results each map gave back at once."""

    workers = 2

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def map(self, fn, units, shared, *rest):
        found = super().map(fn, units, shared, *rest)
        self.sizes.append(len(found))
        return found


def test_the_driver_holds_gradients_of_one_batch_a_worker():
    model, batches = prepared()
    with Counting() as executor:
        trajectory_on_workers(OneShot(levels=(0.5,)), TASK, model, batches, executor)
    assert executor.sizes == [2, 2, 1]


def test_frozen_parameters_are_refused():
    model, batches = prepared()
    model.model.embed_tokens.weight.requires_grad_(False)
    with fs.SerialExecutor() as executor, pytest.raises(ValueError, match=r"\['model.embed_tokens.weight'\] of the model are frozen"):
        trajectory_on_workers(PRUNER, TASK, model, batches, executor)


def test_defaults_are_those_of_the_model_before_they_are_checked():
    task = Residual()
    model, batch = task.build(0), task.data().train.batch(np.arange(8))
    pruner = GISP(couple_residual=True, importance=FirstOrder(aggregate="sum_abs"))
    with fs.SerialExecutor() as executor, pytest.raises(ValueError, match=r"reduce in .*, and for this model it is 'abs_then_mean'"):
        trajectory_on_workers(pruner, task, model, [batch], executor)


def test_what_is_no_mean_gradient_of_weights_is_refused():
    model, batches = prepared()
    with fs.SerialExecutor() as executor:
        for fields in ({"aggregate": "gate"}, {"aggregate": "taylor2"}, {"reduce": "abs_then_mean"}):
            with pytest.raises(ValueError, match="calibration is split over workers for"):
                trajectory_on_workers(GISP(importance=FirstOrder(**fields)), TASK, model, batches, executor)
