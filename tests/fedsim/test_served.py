"""Losses of served submodels: the same bits whoever is evaluated together, computed once, and array code over the fleet."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import fedsim as fs
from fedsim.errors import DivergedError
from fedsim.parameters import Layout
from fedsim.policies import Never
from fedsim.pruning import Submodel
from fedsim.runs.schema import tabulate
from fedsim.runtime.serial import SerialExecutor
from fedsim.served import LANES, LaneUnit, Ledger, ServeUnit, serve_block, serve_lanes
from fedsim.serving import Server, _lanes
from fedsim.simulation import deploy_stage, run, world
from fedsim.submodels import DenseModel, Variant

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

GLOBAL = fs.GISP(levels=(0.0, 0.4, 0.6), steps=4, calibration="global", calibration_examples=32)
DRIFTS = (fs.Drift(fs.DomainSwitch(), at=6, clients=0.5), fs.Drift(fs.LabelSwap(cycle=3), at=9, clients=0.5, onset=fs.Gradual(5)))


class Setting:
    """A dense model, its streams and submodels of three levels."""

    def __init__(self, batch=1, num=12, **fields):
        serving = fs.Serving(ticks=100, batch=batch, drift=DRIFTS, **fields)
        self.simulation = tiny.simulation(
            fleet=fs.Fleet.sample(num, partition=fs.Resampled(size=20, by="domain", alpha=0.5)),
            deployment=GLOBAL,
            serving=serving,
            policy=Never(),
        )
        task = self.simulation.task
        module = task.build(0)
        self.params = Layout.of(module).flatten(module)
        self.dense = DenseModel.of(task, self.params, GLOBAL)
        self.deployed, _ = deploy_stage(self.simulation, self, SerialExecutor())
        self.stream = world(self.simulation)
        self.shared = {"task": task, "params": self.params, "stream": self.stream, "gisp": GLOBAL, "model": self.dense.digest}
        self.variants = (Variant(Submodel.dense(self.dense.smap)), *self.deployed.variants)

    def server(self, executor, memo=None):
        return Server.prepare(self.simulation, self.stream, self.params, self.deployed, executor, memo)

    def ledger(self, executor, lanes, memo=None):
        options = {"ticks": 100, "batch": self.stream.batch, "lanes": lanes, "memo": memo, "world": "here"}
        return Ledger(executor, self.shared, self.variants[0], self.stream.laws.shares.shape[0], **options)


class Counting(SerialExecutor):
    """How many clients were evaluated."""

    evaluated = 0

    def map(self, fn, units, shared, *needs):
        self.evaluated += sum(len(unit.clients) for unit in units if isinstance(unit, ServeUnit | LaneUnit))
        return super().map(fn, units, shared, *needs)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_clients_in_lanes_lose_what_each_loses_alone(batch):
    setting, clients = Setting(batch), np.arange(12)
    for variant in setting.variants:
        together = serve_lanes(LaneUnit(3, 7, clients, variant, 8), setting.shared, {})
        alone = serve_block(ServeUnit(3, 7, tuple(range(12)), (variant,) * 12), setting.shared, {})
        assert_allclose(together, alone, atol=2e-6)
        assert_array_equal(together[:, 1], alone[:, 1].astype(together.dtype))
    assert np.abs(together - alone[::-1]).max() > 1e-3, "other clients lose otherwise"


@pytest.mark.parametrize("batch", [1, 3, 5, 16])
@pytest.mark.parametrize("hidden", [(64, 64), (37, 21)])
def test_the_bits_of_a_client_do_not_depend_on_its_company_its_lane_or_the_width(batch, hidden):
    setting = Setting(batch)
    task = replace(setting.simulation.task, hidden=hidden)
    module = task.build(0)
    params = Layout.of(module).flatten(module)
    dense = DenseModel.of(task, params, GLOBAL)
    shared = {**setting.shared, "task": task, "params": params, "model": dense.digest}
    trajectory = GLOBAL.trajectory(dense.module, dense.smap, task.losses, [task.data().train.batch(np.arange(16))])
    for submodel in (Submodel.dense(dense.smap), trajectory.at(0.6)):
        whole = serve_lanes(LaneUnit(0, 5, np.arange(12), Variant(submodel), 256), shared, {})
        for clients, lanes in (([7], 8), ([11, 7, 2], 4), (range(11, -1, -1), 4), ([3, 7, 5, 1, 0], 256)):
            some = serve_lanes(LaneUnit(0, 5, np.array(clients), Variant(submodel), lanes), shared, {})
            assert_array_equal(some, whole[np.array(clients)])


@pytest.mark.parametrize("lanes", [1, 8])
def test_a_ledger_gives_each_tick_the_figures_of_its_clients_and_submodels(lanes):
    setting = Setting(batch=5)
    rng, ledger = np.random.default_rng(0), setting.ledger(SerialExecutor(), lanes)
    index = rng.integers(0, 4, 12)
    for tick in (0, 1, 2, 3, 40, 41, 99):
        index = np.where(rng.random(12) < 0.2, rng.integers(0, 4, 12), index)
        clients = np.flatnonzero(rng.random(12) < 0.7)
        found = ledger.at(tick, clients, setting.variants, index[clients])
        for place, client in enumerate(clients):
            unit = ServeUnit(tick, 1, (int(client),) * 2, (setting.variants[index[client]], setting.variants[0]))
            assert_allclose(found[:, :, place], serve_block(unit, setting.shared, {})[:, :, 0], atol=2e-6)


def test_figures_are_computed_once_for_all_who_share_a_memo_and_once_a_block_for_those_who_do_not():
    setting, clients, index = Setting(batch=4), np.arange(12), np.arange(12) % 4
    memo, first, second, own = {}, Counting(), Counting(), Counting()

    def evaluations(index):
        """Everyone with the whole model, and with its own where that is another."""
        return 12 + sum(setting.variants[i].digest != setting.variants[0].digest for i in index)

    found = setting.ledger(first, 8, memo).at(2, clients, setting.variants, index)
    assert first.evaluated == evaluations(index) < 24
    ledger = setting.ledger(second, 8, memo)
    assert_array_equal(ledger.at(2, clients, setting.variants, index), found)
    assert second.evaluated == 0
    other = np.where(clients == 3, 2, index)
    ledger.at(3, clients, setting.variants, other)
    assert second.evaluated == 1, "one client changed its submodel"
    ledger.at(4, clients, setting.variants, other)
    assert second.evaluated == 1 + evaluations(other), "four ticks of four examples fill a lane"
    alone = setting.ledger(own, 8)
    assert_array_equal(alone.at(2, clients, setting.variants, index), found)
    alone.at(3, clients, setting.variants, index)
    assert own.evaluated == evaluations(index)


def test_a_server_that_starts_in_the_middle_of_a_block_goes_on_with_the_same_bits():
    setting = Setting(batch=2, lanes=8)
    server = setting.server(SerialExecutor())
    state, records = server.init(), []
    for _ in range(21):
        middle = state
        state, found = server.step(state)
        records.append(found)
    _, again = setting.server(SerialExecutor()).step(middle)
    for table, columns in tabulate(again).items():
        for name, values in tabulate(records[-1])[table].items():
            assert_array_equal(columns[name], values)


def test_a_run_in_lanes_is_the_run_one_by_one_up_to_rounding():
    base = tiny.simulation(rounds=2, deployment=GLOBAL, policy=Never())
    alone = tabulate(run(base))
    lanes = tabulate(run(replace(base, serving=replace(base.serving, lanes=8))))
    assert_array_equal(lanes["ticks"]["accuracy"], alone["ticks"]["accuracy"])
    assert_allclose(lanes["ticks"]["loss"], alone["ticks"]["loss"], atol=1e-5)
    assert_allclose(lanes["ticks"]["dense_loss"], alone["ticks"]["dense_loss"], atol=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_lanes_on_two_workers_give_the_bits_of_one():
    base = tiny.simulation(rounds=2, deployment=GLOBAL)
    simulation = replace(base, serving=replace(base.serving, lanes=4))
    with fs.RayExecutor(workers=2) as executor:
        there = tabulate(run(simulation, executor))
    here = tabulate(run(simulation))
    for name, values in here["ticks"].items():
        assert_array_equal(there["ticks"][name], values)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_many_clients_of_few_submodels_are_served_in_lanes_by_rule():
    large = Setting(num=4096)
    assert _lanes(large.simulation, large.dense) == LANES
    own = replace(large.simulation, deployment=replace(GLOBAL, calibration="client"))
    assert _lanes(own, large.dense) == 1
    small = Setting()
    assert _lanes(small.simulation, small.dense) == 1
    with pytest.raises(ValueError, match=r"cannot be served as 4 lanes.*use Serving\(lanes=1\)"):
        _lanes(Setting(lanes=4).simulation, replace(small.dense, module=Branching()))
    with pytest.raises(ValueError, match="lanes must be a power of two, got 12"):
        fs.Serving(lanes=12)


def test_a_loss_that_is_not_finite_is_named_with_its_client():
    setting = Setting()
    broken = torch.full((setting.params.size,), torch.nan).numpy()
    shared = {**setting.shared, "params": broken, "model": "broken"}
    with pytest.raises(DivergedError, match="client 9"):
        serve_lanes(LaneUnit(0, 4, np.array([9, 3]), setting.variants[0], 8), shared, {})


def test_figures_of_single_examples_are_held_in_single_precision():
    assert serve_lanes(LaneUnit(0, 4, np.arange(3), Setting().variants[0], 8), Setting().shared, {}).dtype == np.float32


def calls(num):
    """Python calls of a tick inside a block, of ``num`` clients whose law stands."""
    setting = Setting(num=num)
    server = setting.server(SerialExecutor())
    state = server.init()
    while state.monitor.scores is None or state.tick % 16 == 0:
        state, _ = server.step(state)
    count = [0]
    sys.setprofile(lambda frame, event, argument: count.__setitem__(0, count[0] + (event in ("call", "c_call"))))
    try:
        _, records = server.step(state)
    finally:
        sys.setprofile(None)
    assert len(records) == 1, "nobody alarmed"
    return count[0]


@pytest.mark.slow
def test_a_quiet_tick_makes_no_python_call_a_client():
    assert calls(9000) == calls(4500)
