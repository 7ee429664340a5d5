"""One client of a stored round, trained again step by step, against the engine's own blocks and the losses that were stored."""

import importlib.util
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import fedsim as fs
from fedsim.local_training import train_unit
from fedsim.parameters import Layout
from fedsim.replaying import replay
from fedsim.retracing import Retraced, taken_apart
from fedsim.runs.schema import column
from fedsim.strategies import FedBuff
from fedsim.tasks.base import Dataset, Splits, Task

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

UNIFORM = {"communication": fs.Uniform(), "strategy": fs.FedAvg(client_lr=0.1, cohort=8, local_steps=8, momentum=0.5)}


def simulated(place, **changes):
    short = {"serving": fs.Serving(ticks=12), "monitoring": fs.Monitoring(calibration=10, recalibration=10), "rounds": 5}
    deployment = fs.GISP(levels=(0.0,), calibration="global")
    simulation = tiny.simulation(**{**short, **UNIFORM, "deployment": deployment, "evaluate_every": 50, **changes})
    return fs.simulate(simulation, place, executor=fs.SerialExecutor(), progress=False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("runs"))


def cohort(run, round):
    table = run.clients()
    merged = (column(table, "round") == round) & (column(table, "uploads") > 0)
    return column(table, "client")[merged].tolist()


def engine_end(run, round, client):
    """Where the engine's block leaves a client after the round's last merge, as the mean of a merge in which nobody else has weight."""
    retraced = Retraced(run)
    part = taken_apart(retraced.local, retraced.before(round), [client])[-1]
    weights = (part.unit.clients == client)[None].astype(float)
    (outcome,) = retraced.local.executor.map(train_unit, [replace(part.unit, weights=weights)], part.shared)
    held = part.shared["shapes"][part.unit.shape].coordinates
    return outcome.node.total if held is None else outcome.node.total[held]


@pytest.mark.parametrize("lanes", [1, 8])
def test_a_client_is_led_where_the_engine_led_it(tmp_path, lanes):
    run = simulated(tmp_path, lanes=lanes)
    for client in cohort(run, 3)[:3]:
        end = replay(run, round=3, client=client).end()
        expected = engine_end(run, 3, client)
        assert_allclose(end, expected, atol=1e-5)
        if lanes == 1:
            assert_array_equal(end, expected)


def test_another_clients_way_ends_elsewhere(stored):
    first, second = cohort(stored, 3)[:2]
    assert abs(replay(stored, round=3, client=first).end() - engine_end(stored, 3, second)).max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"communication": fs.RandomGroup(high=2, low=8, size=3)},
        {"communication": fs.FedSGD()},
        {"communication": fs.Uniform(uploads=2), "strategy": fs.Scaffold(client_lr=0.1, cohort=8, local_steps=8)},
        {"strategy": fs.FedProx(client_lr=0.1, cohort=8, mu=0.5, local_epochs=0.7)},
        {"strategy": FedBuff(client_lr=0.1, buffer=6, concurrency=8, local_steps=8)},
        {"strategy": fs.FedAvg(client_lr=0.1, cohort=8, local_steps=8, clip=0.5, weight_decay=0.01)},
        {"strategy": fs.HeteroFL(client_lr=0.1, cohort=8, local_steps=8, widths=fs.Widths(rates=(1.0, 0.5), shares=(1, 1)))},
    ],
    ids=["mixed", "every-step", "scaffold", "epochs", "buffered", "clipped", "widths"],
)
def test_the_stored_loss_is_the_mean_of_the_steps(tmp_path, changes):
    run = simulated(tmp_path, **changes)
    for client in cohort(run, 4):
        again = replay(run, round=4, client=client)
        assert np.mean([step.loss for step in again]) == pytest.approx(again.stored_loss, abs=1e-5)


def test_steps_are_numbered_and_can_be_had_again(stored):
    again = replay(stored, round=2, client=cohort(stored, 2)[0])
    first, second = list(again), list(again)
    assert [s.step for s in first] == list(range(8))
    assert [(s.loss, s.gradient_norm) for s in first] == [(s.loss, s.gradient_norm) for s in second]
    for a, b in zip(first, second, strict=True):
        assert_array_equal(a.examples, b.examples)


@dataclass(frozen=True)
class Noted(Task):
    """Inputs end with the number of their example; the loss notes whom it saw, and at which parameters."""

    num_classes: int = 3

    def load(self):
        rng = np.random.default_rng(0)
        inputs = np.concatenate([rng.normal(size=(200, 4)), np.arange(200)[:, None] / 100], axis=1).astype(np.float32)
        data = Dataset(inputs, rng.integers(0, 3, 200))
        return Splits(data, data)

    def build(self, seed):
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape) * (-1) ** i)
        return model

    def losses(self, model, batch):
        if SEEN is not None:
            SEEN.append((torch.round(batch.inputs[:, -1] * 100).long().tolist(), Layout.of(model).flatten(model)))
        return super().losses(model, batch)


SEEN = None


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SEEN", [], raising=False)
    return sys.modules[__name__].SEEN


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    fleet = fs.Fleet.sample(6, partition=fs.IID(), seed=0)
    strategy = fs.FedAvg(client_lr=0.1, cohort=3, local_steps=4, batch_size=5)
    return simulated(
        tmp_path_factory.mktemp("runs"), task=Noted(), fleet=fleet, strategy=strategy, lanes=1, rounds=3, serving=fs.Serving(ticks=12)
    )


def test_batches_are_those_the_engine_trained_on(noted, seen):
    retraced = Retraced(noted)
    before = retraced.before(2)
    seen.clear()
    retraced.step(before)
    engine = {}  # the loop trains one client after another, four steps each, in ascending order; then comes the evaluation
    for position, client in enumerate(cohort(noted, 2)):
        engine[client] = [examples for examples, _ in seen[4 * position : 4 * position + 4]]
    for client, batches in engine.items():
        assert [s.examples.tolist() for s in replay(noted, round=2, client=client)] == batches


def test_gradient_norms_are_those_of_the_steps_taken(noted, seen):
    again = replay(noted, round=1, client=cohort(noted, 1)[0])
    seen.clear()
    steps = list(again)
    ways = [*(params for _, params in seen), again.end()]
    for step, (before, after) in zip(steps, pairwise(ways[:5]), strict=False):
        assert step.gradient_norm == pytest.approx(np.linalg.norm(after - before) / 0.1, rel=1e-3)
    assert_array_equal(ways[0], again.start())


def test_the_debugger_opens_before_every_step(stored, monkeypatch):
    frames = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: frames.append(sys._getframe(1).f_locals))
    steps = list(replay(stored, round=1, client=cohort(stored, 1)[0], breakpoint=True))
    assert len(frames) == len(steps) == 8
    assert isinstance(frames[0]["model"], nn.Module)
    assert len(frames[0]["batch"].inputs) == 16


def test_iterating_leaves_the_callers_random_numbers_alone(stored):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(replay(stored, round=1, client=cohort(stored, 1)[0]))
    assert_array_equal(torch.get_rng_state(), before)


def test_what_was_not_trained_is_refused(stored, tmp_path):
    absent = next(c for c in range(12) if c not in cohort(stored, 1))
    with pytest.raises(ValueError, match=f"client {absent} took no part in round 1; its cohort was "):
        replay(stored, round=1, client=absent)
    with pytest.raises(ValueError, match="round must be one of the stored rounds of training, 0 to 4, got 5"):
        replay(stored, round=5, client=0)
    dropped = simulated(tmp_path, dropout=fs.Dropout(probability=0.5))
    table = dropped.clients()
    lost = np.flatnonzero(column(table, "uploads") == 0)[0]
    round, client = (int(column(table, name)[lost]) for name in ("round", "client"))
    with pytest.raises(ValueError, match=f"nothing of client {client} was merged in round {round}: it was too slow or vanished"):
        replay(dropped, round=round, client=client)
