"""Timing lane widths: what is computed from the seconds, what is advised, and that real timings favour lanes where dispatch dominates."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import fedsim as fs
from fedsim import tuning
from fedsim.tuning import Bench, tune

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

STRATEGY = fs.FedAvg(client_lr=0.1, cohort=12, local_steps=10, batch_size=8)


def simulation(**changes):
    fleet = fs.Fleet.sample(
        40, devices=[fs.DeviceClass(name="d", share=1, flops=1e9, memory=1e9, up=1e6, down=1e6)], partition=fs.IID(), seed=0
    )
    return tiny.simulation(**{"fleet": fleet, "strategy": STRATEGY, "communication": fs.Uniform(), **changes})


@pytest.fixture
def clock(monkeypatch):
    """Seconds by width, in place of the clock's; notes who was asked in which order."""
    asked = []

    def seconds(bench, lanes, steps):
        asked.append((lanes, steps))
        return steps * len(bench.clients) * COST[lanes]

    monkeypatch.setattr(Bench, "seconds", seconds)
    return asked


COST = {1: 0.004, 4: 0.001, 8: 0.0005, 16: 0.00049, 32: 0.0005, 64: 0.0006}  # of a client's local step


def test_rates_are_clients_through_all_their_local_steps(clock):
    found = tune(simulation())
    assert [t.lanes for t in found.timings] == [1, 4, 8, 16]
    for timing in found.timings:
        assert timing.clients_per_second == pytest.approx((1 / (10 * COST[timing.lanes]),) * 3)
        assert timing.ratio == pytest.approx((COST[1] / COST[timing.lanes],) * 3)


def test_the_narrowest_of_those_about_as_fast_is_advised(clock):
    found = tune(simulation(lanes=4))
    assert (found.best, found.line) == (8, "lanes=8,")
    assert "put into the recipe's Simulation: lanes=8,   (it means 4 now" in found.table()


def test_a_recipe_that_has_the_best_width_is_left_in_peace(clock):
    assert "lanes=8 is what the recipe means already" in tune(simulation(lanes=8)).table()


def test_a_width_beyond_the_cohort_is_one_block_of_all(clock, monkeypatch):
    monkeypatch.setitem(COST, 16, 0.0001)
    found = tune(simulation(lanes=64))
    assert "left out: 32, 64, wider than the 12 clients" in found.note
    assert "lanes=64 is what the recipe means already" in found.table()


def test_every_repetition_times_every_width_once_and_none_is_always_first(clock):
    found = tune(simulation(), widths=(1, 4, 8), seconds=30)
    timed = [lanes for lanes, steps in clock[-3 * found.repetitions :]]
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert all(sorted(r) == [1, 4, 8] for r in rounds)
    assert {r[0] for r in rounds} == {1, 4, 8}


def test_the_time_asked_for_bounds_the_work(clock):
    assert tune(simulation(), seconds=1e-3).steps == 1
    assert tune(simulation(), seconds=100).steps == 10


@dataclass(frozen=True, kw_only=True)
class Branching(fs.tasks.Digits):
    """A loss that looks at its data."""

    def losses(self, model, batch):
        losses = super().losses(model, batch)
        return losses if float(losses.detach().sum()) > 0 else 0 * losses


def test_a_model_that_cannot_be_batched_is_told_why(clock):
    found = tune(simulation(task=Branching(hidden=(8,), domains=("upright", "inverted"))))
    assert [t.lanes for t in found.timings] == [1]
    assert found.best == 1
    assert "cannot train as lanes of one program" in found.table()


@pytest.mark.parametrize("strategy", [fs.Scaffold(cohort=12, local_steps=4), fs.FedAvg(cohort=12, local_epochs=0.5, momentum=0.9)])
def test_every_strategy_can_be_timed(strategy):
    found = tune(simulation(strategy=strategy), widths=(1, 4), seconds=0.05)
    assert all(t.clients_per_second[1] > 0 for t in found.timings)


def test_lanes_of_a_small_perceptron_beat_the_loop():
    found = tune(simulation(), seconds=2)
    assert found.timings[-1].ratio[0] > 1.5
    assert found.best > 1


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="widths must be a power of two, got 3"):
        tune(simulation(), widths=(1, 3))
    with pytest.raises(ValueError, match="positive time"):
        tune(simulation(), seconds=0)


def test_a_simulation_is_not_changed_by_timing_it():
    before = simulation()
    tune(before, widths=(1, 4), seconds=0.05)
    assert before.lanes is None
    assert tuning.training_of(replace(before), fs.SerialExecutor()).lanes == 64
