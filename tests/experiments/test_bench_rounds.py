"""The engines of the benchmark do the same work, and no ratio is printed where they do not."""

import os
import sys
from dataclasses import replace
from math import isnan
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.benchmarks import bench_rounds
from experiments.peers import by_hand, loop, ours, pfl_research, process, race
from experiments.peers.job import JOBS, named
from experiments.study import Skipped
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


@pytest.mark.parametrize("program", [by_hand.run_torch, by_hand.run_numpy, loop.run_with_loaders])
def test_other_programs_end_with_the_parameters_of_the_loop(program):
    assert_allclose(program(MLP, 3)[1], loop.run(MLP, 3)[1], rtol=0, atol=1e-5)


def test_other_batches_are_seen_by_that_tolerance():
    assert np.abs(loop.run(replace(MLP, seed=0, batch=8), 3)[1] - loop.run(MLP, 3)[1]).max() > 1e-3


def test_engines_that_did_other_work_are_refused():
    with pytest.raises(RuntimeError, match="not do the same work"):
        race.race(MLP, {"a": lambda: loop.run(MLP, 3), "b": lambda: loop.run(replace(MLP, rate=0.5), 3)}, 1)
    with pytest.raises(RuntimeError, match="not do the same work"):
        race.same_loss(MLP, {"a": 1.0, "b": float("nan")}, 0.02)


def test_every_engine_runs_once_in_every_repetition_and_the_first_is_the_unit():
    calls = []

    def engine(name, seconds):
        def run():
            calls.append(name)
            return [9.0, seconds, seconds], MLP.initial()

        return run

    found = race.race(MLP, {"a": engine("a", 2.0), "b": engine("b", 0.5)}, 3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert found["b"] == race.Raced((0.5, 0.5, 0.5), 9.0, found["a"].loss)
    assert "4.00 [4.00, 4.00]" in race.table(MLP, found)


def test_a_ratio_is_the_median_of_the_pairs_and_names_least_and_most():
    claim = race.faster("x", [4.0, 9.0, 10.0], [2.0, 3.0, 1.0], ">= 3 x", "why")
    assert claim.value == 3.0
    assert claim.note == "3 pairs, 2.00 to 10.00; why"


def test_what_was_not_measured_does_not_hold():
    claim = race.unmeasured("x", ">= 1 x", "pip failed")
    assert isnan(claim.value)
    assert not claim.holds
    assert "pip failed" in claim.note


def test_a_busy_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    monkeypatch.delenv("FEDSIM_NOISY", raising=False)
    with pytest.raises(Skipped, match="load 99"):
        bench_rounds.run(True, tmp_path)


def test_a_process_is_timed_and_weighed_and_one_that_fails_says_why():
    script = "import json, sys, time; held = b'x' * 50_000_000; time.sleep(0.5); json.dump({'seconds': [0.1, 0.2, 0.3], 'loss': 1.5}, open(sys.argv[1], 'w'))"
    ended = process.run([sys.executable, "-c", script])
    assert ended.whole > 0.5
    assert ended.start == pytest.approx(ended.whole - 0.6)
    assert (ended.steady, ended.loss) == (0.25, 1.5)
    assert ended.memory > 50_000_000
    with pytest.raises(RuntimeError, match="disk on fire"):
        process.run([sys.executable, "-c", "raise SystemExit('disk on fire')"])


def test_jobs_are_found_by_name():
    assert named("MLP") is JOBS[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "by-hand", "fedsim"])
def test_whole_processes_end_with_the_loss_of_the_loop(engine):
    ended = process.engine(engine, JOBS[0], 2)
    assert ended.loss == pytest.approx(JOBS[0].test_loss(loop.run(JOBS[0], 2)[1]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("engine", ["fedsim-ray", "flower"])
def test_engines_with_workers_end_with_the_loss_of_the_loop(engine):
    ended = process.engine(engine, JOBS[0], 2)
    assert ended.loss == pytest.approx(JOBS[0].test_loss(loop.run(JOBS[0], 2)[1]), rel=1e-4)


@pytest.mark.slow
def test_pfl_ends_with_the_loss_of_the_loop(tmp_path):
    folder = Path(os.environ.get("FEDSIM_PEERS", "results/peers")) / "pfl"
    if not folder.exists():
        pytest.skip(f"no environment with pfl in {folder}; the benchmark makes one")
    ended = process.run(pfl_research.command(JOBS[0], 2, pfl_research.environment(folder), tmp_path))
    assert ended.loss == pytest.approx(JOBS[0].test_loss(loop.run(JOBS[0], 2)[1]), rel=1e-3)
