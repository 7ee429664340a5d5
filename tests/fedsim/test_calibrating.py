"""Calibration split over workers: the bits of one process, whatever the number of workers."""

import numpy as np
import pytest

import fedsim as fs
from fedsim.calibrating import trajectory_on_workers
from fedsim.llm import Arithmetic, Decoder, Reasoning
from fedsim.llm.arithmetic import characters
from fedsim.pruning import GISP, FirstOrder, OneShot

TASK = Reasoning(
    problems=Arithmetic(number=60, words=1),
    model=Decoder(layers=2, width=32, heads=4, kv_heads=2, hidden=48),
    tokenizer=characters(),
    length=48,
)
PRUNER = GISP(levels=(0.5,), steps=4)


def prepared():
    model, train = TASK.build(0).eval(), TASK.data().train
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


@pytest.mark.ray
def test_the_number_of_workers_changes_no_bit():
    model, batches = prepared()
    expected = PRUNER.trajectory(model, TASK.structures(model), TASK.losses, batches)
    for workers in (1, 2):
        with fs.RayExecutor(workers=workers) as executor:
            assert trajectory_on_workers(PRUNER, TASK, model, batches, executor) == expected


def test_what_is_no_mean_gradient_of_weights_is_refused():
    model, batches = prepared()
    with fs.SerialExecutor() as executor:
        for fields in ({"aggregate": "gate"}, {"aggregate": "taylor2"}, {"reduce": "abs_then_mean"}):
            with pytest.raises(ValueError, match="calibration is split over workers for"):
                trajectory_on_workers(GISP(importance=FirstOrder(**fields)), TASK, model, batches, executor)
