"""The engines of the benchmark do the same work: one small job, one model."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.benchmarks import bench_rounds
from experiments.peers import by_hand, loop, ours
from experiments.peers.job import JOBS, named
from fedsim.runtime import SerialExecutor

MLP = replace(JOBS[0], clients=20, cohort=6, examples=40, rounds=3)
PICTURES = replace(JOBS[1], clients=20, cohort=5, examples=20, steps=2, rounds=2, batch=8)


@pytest.mark.parametrize("job", [MLP, PICTURES], ids=lambda job: job.name)
def test_fedsim_ends_with_the_parameters_of_the_loop(job):
    expected = loop.run(job, job.rounds)[1]
    for lanes in (1, None):
        assert_allclose(ours.run(job, job.rounds, SerialExecutor(), lanes)[1], expected, rtol=0, atol=1e-5)
    if job is PICTURES:
        assert_allclose(loop.run(job, job.rounds, channels_last=True)[1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("program", [by_hand.run_torch, by_hand.run_numpy])
def test_programs_by_hand_end_with_the_parameters_of_the_loop(program):
    assert_allclose(program(MLP, 3)[1], loop.run(MLP, 3)[1], rtol=0, atol=1e-5)


def test_other_batches_are_seen_by_that_tolerance():
    assert np.abs(loop.run(replace(MLP, seed=0, batch=8), 3)[1] - loop.run(MLP, 3)[1]).max() > 1e-3


def test_engines_that_did_other_work_are_refused():
    with pytest.raises(RuntimeError, match="not do the same work"):
        bench_rounds.in_turn(MLP, {"a": lambda: loop.run(MLP, 3), "b": lambda: loop.run(replace(MLP, rate=0.5), 3)}, 1)


def test_jobs_are_found_by_name():
    assert named("MLP") is JOBS[0]
