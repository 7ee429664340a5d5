"""What a plan will cost: exact against the records of the run itself, refused for the reasons the run would give, seconds of the right size."""

import importlib.util
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import fedsim as fs
from fedsim import explanation
from fedsim.dry_run import _longest
from fedsim.errors import CapacityError
from fedsim.explanation import Estimate, explain
from fedsim.simulation import check, train_steps
from fedsim.strategies import FedBuff

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

QUICK = {"client_lr": 0.05, "cohort": 8, "local_steps": 8}
UNIFORM = {"communication": fs.Uniform(), "rounds": 6}
PLANS = {
    "dynamic": {},
    "uniform": UNIFORM,
    "every step": {**UNIFORM, "communication": fs.FedSGD(), "strategy": fs.FedAvg(**QUICK)},
    "group": {**UNIFORM, "communication": fs.FastestGroup(high=2, low=8, size=3), "strategy": fs.FedAvg(**QUICK, momentum=0.5)},
    "epochs": {**UNIFORM, "strategy": fs.FedProx(client_lr=0.05, cohort=8, mu=0.1, local_epochs=0.7)},
    "client state": {**UNIFORM, "strategy": fs.Scaffold(**QUICK)},
    "compressed": {**UNIFORM, "strategy": fs.FedAvg(**QUICK, compression=fs.ErrorFeedback(inner=fs.Quantised(bits=4)))},
    "server state": {**UNIFORM, "strategy": fs.FedAdam(**QUICK)},
    "widths": {**UNIFORM, "strategy": fs.HeteroFL(**QUICK, widths=fs.Widths(rates=(1.0, 0.5), shares=(1, 1)))},
    "stragglers": {**UNIFORM, "deadline": fs.Deadline(seconds=2.0, over_select=1.5), "dropout": fs.Dropout(probability=0.4)},
    "by the hour": {**UNIFORM, "availability": fs.Diurnal(peak_hour=6.0, floor=0.0)},
    "buffered": {**UNIFORM, "strategy": FedBuff(client_lr=0.05, local_steps=8, buffer=5, concurrency=8)},
}


@pytest.mark.parametrize("name", PLANS)
def test_bytes_flops_and_time_are_those_the_run_books(name):
    simulation = tiny.simulation(**PLANS[name])
    rounds = [step.records[0] for step in train_steps(simulation, fs.SerialExecutor())]
    found = explain(simulation, fs.SerialExecutor())
    assert found.exact
    totals = found.totals
    for field in ("uploads", "bytes_up", "bytes_down", "wasted_bytes", "flops", "wasted_flops"):
        assert getattr(totals, field) == sum(getattr(r, field) for r in rounds), field
    assert totals.clock == rounds[-1].clock
    assert totals.clients == len(set(np.concatenate([r.cohort for r in rounds]).tolist()))


def test_what_is_booked_does_not_depend_on_workers():
    simulation = tiny.simulation(lanes=4)
    one, many = (explain(simulation, workers=workers) for workers in (1, 64))
    assert one.totals == many.totals
    assert many.workers == 64


def test_many_rounds_are_extrapolated_and_it_is_said():
    alike = fs.DeviceClass(name="d", share=1, flops=1e9, memory=1e9, up=1e6, down=1e6, spread=0.0, link_spread=0.0)
    fleet = fs.Fleet.sample(12, devices=[alike], partition=fs.Dirichlet(alpha=0.1, by="domain", minimum=32), seed=0)
    plan = tiny.simulation(**{**UNIFORM, "rounds": 40, "fleet": fleet})
    whole, part = (explain(plan, workers=1, seconds=s) for s in (30.0, 0.0))
    assert (whole.planned, part.planned) == (40, 1)
    assert not part.exact
    assert "extrapolated from the first 1 rounds" in part.table()
    for field in ("bytes_up", "bytes_down", "flops", "clock"):
        assert getattr(part.totals, field) == pytest.approx(getattr(whole.totals, field), rel=1e-9)
    assert isinstance(part.totals.bytes_up, int)
    assert part.totals.clients == pytest.approx(whole.totals.clients, abs=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity": fs.Capacity(scale="absolute", memory_share=1e-9)},
        {"deployment": fs.GISP(levels=(0.0, 0.995))},
        {"serving": fs.Serving(ticks=100, activity=fs.Sampled(50))},
    ],
)
def test_a_plan_is_refused_for_the_reason_the_check_gives(changes):
    simulation = tiny.simulation(**changes)
    with pytest.raises((ValueError, CapacityError)) as refusal:
        check(simulation)
    found = explain(simulation, workers=1)
    assert found.refused == " ".join(str(refusal.value).split())
    assert found.table().startswith("refused: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"communication": fs.Intervals.explicit([4, 10])}, "points must end at local_steps = 32"),
        ({"deadline": fs.Deadline(seconds=9)}, "a deadline needs one upload a round"),
        ({"strategy": FedBuff(concurrency=13), "communication": fs.Uniform()}, "concurrency=13 is more than the 12 clients"),
    ],
)
def test_training_that_cannot_begin_is_refused(changes, message):
    assert message in explain(tiny.simulation(**changes), workers=1).refused


def test_warnings_become_notes():
    early = fs.Serving(ticks=100, drift=fs.Drift(fs.DomainSwitch(), start=fs.At(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explain(tiny.simulation(serving=early), workers=1)
    assert any("clients change before tick 25" in note for note in found.notes)


def test_memory_is_counted():
    simulation = tiny.simulation(strategy=fs.Scaffold(**QUICK, batch_size=4), communication=fs.Uniform())
    memory = explain(simulation, workers=1).memory
    parameters = 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    assert memory["model"] == 4 * parameters
    train, test = simulation.task.data()
    assert memory["data, here and once for all workers"] >= train.inputs.nbytes + test.inputs.nbytes
    assert memory["what clients keep, on disk"] == 2 * 4 * parameters * 12
    assert memory["watching the fleet"] >= 12 * 25 * 8
    block = memory["each worker"] - explanation._PROCESS - memory["model"]
    assert block >= 64 * 3 * memory["model"], "64 lanes of weights, gradients and control variates"
    assert "what clients keep, on disk" not in explain(tiny.simulation(), workers=1).memory


def test_the_busiest_worker_is_found_as_by_hand():
    rng = np.random.default_rng(0)
    for workers in (1, 2, 3):
        costs = rng.integers(1, 9, 6).tolist()
        best = min(max(np.bincount(where, costs, workers)) for where in product(range(workers), repeat=6))
        assert best <= _longest(costs, workers) <= 4 / 3 * best  # Graham (1969)
    assert _longest([], 2) == 0.0


def test_estimates_add_and_scale():
    assert Estimate(1, 0.5, 2) + Estimate(1, 1, 1) * 2 == Estimate(3, 2.5, 4)


def test_nothing_is_trained_on_the_executor_that_is_asked_about(monkeypatch):
    with fs.SerialExecutor() as executor:
        monkeypatch.setattr(executor, "map", lambda *a, **k: pytest.fail("it was used"))
        assert explain(tiny.simulation(), executor).workers == 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [UNIFORM | {"rounds": 60}, {"rounds": 12}, UNIFORM | {"lanes": 1, "rounds": 12}])
def test_seconds_are_of_the_right_size(changes):
    simulation = tiny.simulation(**changes)
    list(train_steps(tiny.simulation(rounds=1), fs.SerialExecutor()))
    predicted = explain(simulation, fs.SerialExecutor()).seconds["train"]
    start = time.perf_counter()
    list(train_steps(simulation, fs.SerialExecutor()))
    real = time.perf_counter() - start
    assert real / 3 < predicted.median < 3 * real
