"""What is refused before any work starts, and runs that other code or data made."""

import importlib.util
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import fedsim as fs
from fedsim.errors import CapacityError, CheckpointError
from fedsim.simulation import check

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def serving(**changes):
    return replace(tiny.simulation().serving, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"serving": serving(drift=fs.Drift(fs.DomainSwitch(to="nowhere"), at=40))}, ValueError, "nowhere"),
        ({"serving": serving(activity=fs.Sampled(50))}, ValueError, "50 active clients, but the fleet has 12"),
        ({"monitoring": fs.Monitoring(shift=0.1, calibration=25, recalibration=20)}, ValueError, "harm must exceed"),
        ({"deployment": fs.GISP(levels=(0.0, 0.995))}, CapacityError, "0.995"),
        ({"capacity": fs.Capacity(scale="absolute", memory_share=1e-9)}, CapacityError, "holds no level"),
        (
            {"fleet": fs.Fleet.sample(3, partition=fs.BySize(sizes=(2586, 0, 0)), seed=0)},
            ValueError,
            "client 1 holds no data to calibrate",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*clients hold no examples")
def test_what_cannot_work_is_refused_before_the_first_round(changes, error, message):
    with pytest.raises(error, match=message):
        next(fs.run(tiny.simulation(**changes)))


def test_a_sound_simulation_passes_without_a_word():
    check(tiny.simulation())


def test_a_change_during_calibration_is_warned_of():
    with pytest.warns(UserWarning, match="clients change before tick 25"):
        check(tiny.simulation(serving=serving(drift=fs.Drift(fs.DomainSwitch(), at=5))))


@pytest.mark.filterwarnings("ignore:.*clients change before")
def test_a_run_in_which_nobody_could_be_watched_says_so(tmp_path):
    rare = tiny.simulation(serving=serving(activity=fs.Sampled(2)))
    with pytest.warns(UserWarning, match="nobody was ever watched"):
        run = fs.simulate(rare, tmp_path, executor=fs.SerialExecutor(), progress=False)
    assert np.isnan(run.scores().false_alarm_rate)


def test_a_run_is_continued_where_it_lies_even_if_it_was_moved(tmp_path, monkeypatch):
    from fedsim.serving import Server

    def interrupted(self, state):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fs.simulate(tiny.simulation(), tmp_path / "here", executor=fs.SerialExecutor(), progress=False)
    monkeypatch.undo()
    moved = tmp_path / "there" / "renamed"
    moved.parent.mkdir()
    shutil.move(next((tmp_path / "here").glob("tiny-*")), moved)
    run = fs.resume(moved, executor=fs.SerialExecutor(), progress=False)
    assert run.path.resolve() == moved.resolve()
    assert run.status() == "complete"


TASK = """
from dataclasses import dataclass
import fedsim as fs
from fedsim.randomness import torch_seeded
from fedsim.tasks.models import mlp

@dataclass(frozen=True, kw_only=True)
class Mine(fs.tasks.Task):
    num_classes: int = 10
    def load(self):
        return fs.tasks.Digits(domains=("upright", "inverted")).data()
    def build(self, seed):
        with torch_seeded(seed, "mine"):
            return mlp((64, WIDTH, 10))
"""


def own_task(folder, width):
    (folder / "mine_task.py").write_text(TASK.replace("WIDTH", str(width)))
    sys.modules.pop("mine_task", None)
    importlib.invalidate_caches()
    return importlib.import_module("mine_task").Mine()


def test_a_task_whose_code_changed_neither_gets_old_results_nor_old_stages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    runs = tmp_path / "runs"
    first = fs.simulate(tiny.simulation(task=own_task(tmp_path, 16)), runs, executor=fs.SerialExecutor(), progress=False)
    changed = tiny.simulation(task=own_task(tmp_path, 24))
    with pytest.raises(CheckpointError, match=r"made by other code or from other data: code .*model"):
        fs.simulate(changed, runs, executor=fs.SerialExecutor(), progress=False)
    second = fs.simulate(replace(changed, policy=fs.Never()), runs, executor=fs.SerialExecutor(), progress=False)
    assert second.deployments()["parameters"].to_pylist() != first.deployments()["parameters"].to_pylist()


@dataclass(frozen=True)
class Greedy(fs.Policy):
    """Asks for client 0 at every tick, busy or not."""

    def init(self, num_clients):
        return fs.Never().init(num_clients)

    def step(self, state, view, alarms, rng):
        return state, [fs.Proposal(client=0, action=fs.Reprune(window=32), latency=0)]


def test_a_policy_that_asks_for_a_busy_client_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Greedy\(\) asked for client 0, which is not in the fleet or already has an action under way"):
        list(fs.run(tiny.simulation(policy=Greedy())))


def test_recovery_is_on_the_books(tmp_path):
    base = tiny.simulation()
    universal = replace(base, deployment=replace(base.deployment, calibration="global"))
    plain, recovered = (
        fs.simulate(replace(universal, recovery_rounds=r), tmp_path, executor=fs.SerialExecutor(), progress=False) for r in (0, 2)
    )
    pruned_levels = len(set(recovered.deployments()["level"].to_pylist()) - {0.0})
    assert len(recovered.rounds()) == len(plain.rounds()) + 2 * pruned_levels
    assert recovered.scores().bytes_train > plain.scores().bytes_train
    clock = recovered.rounds()["clock"].to_pylist()
    assert clock == sorted(clock)
    assert "recovery of level 0.4" in recovered.rounds()["note"].to_pylist()[8]
