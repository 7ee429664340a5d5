import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim as fs
from fedsim.encoding import digest
from fedsim.errors import CapacityError
from fedsim.runs.schema import column
from fedsim.stages import Origin, train_digest

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return fs.simulate(tiny.simulation(), tmp_path_factory.mktemp("runs"), executor=fs.SerialExecutor(), progress=False)


def test_the_generator_yields_what_the_stored_run_holds(stored):
    records = list(fs.run(tiny.simulation()))
    assert [type(r).__name__ for r in records[:9]] == ["Round"] * 8 + ["Deployment"]
    ticks = [r for r in records if isinstance(r, fs.Tick)]
    assert len(ticks) == 100
    np.testing.assert_array_equal(np.concatenate([t.clients["loss"] for t in ticks]), column(stored.ticks(), "loss"))
    events = [r for r in records if isinstance(r, fs.Event)]
    assert [(e.tick, e.client, e.kind) for e in events] == list(
        zip(*(column(stored.events(), n).tolist() for n in ("tick", "client", "kind")), strict=True)
    )


def test_the_story_holds_together(stored):
    """Changed clients lose accuracy, alarms follow the change, redeployments repair."""
    scores = stored.scores()
    assert scores.num_changed > 0
    assert scores.detected > 0
    assert scores.redeployed > 0
    events = stored.events()
    alarms = column(events, "kind") == "alarm"
    assert column(events, "tick")[alarms].min() >= 25, "nobody alarms before its law is learnt"
    never = fs.simulate(tiny.simulation(policy=fs.Never()), stored.path.parent, executor=fs.SerialExecutor(), progress=False).scores()
    assert never.accuracy_before == scores.accuracy_before
    assert scores.accuracy_end > never.accuracy_end + 0.05


def test_an_equal_simulation_is_returned_not_run_again(stored):
    before = {p.name: p.stat().st_mtime_ns for p in stored.path.iterdir()}
    again = fs.simulate(tiny.simulation(), stored.path.parent, executor=fs.SerialExecutor(), progress=False)
    assert again.path == stored.path
    assert {p.name: p.stat().st_mtime_ns for p in stored.path.iterdir()} == before


def test_another_policy_takes_over_the_trained_model_and_the_submodels(stored, monkeypatch):
    from fedsim import driver

    def refuse(*arguments, **options):
        raise AssertionError("trained or pruned again")

    monkeypatch.setattr(driver, "train_steps", refuse)
    monkeypatch.setattr(driver, "deploy_stage", refuse)
    other = fs.simulate(tiny.simulation(policy=fs.Periodic(every=30)), stored.path.parent, executor=fs.SerialExecutor(), progress=False)
    for mine, theirs in ((other.rounds(), stored.rounds()), (other.deployments(), stored.deployments())):
        for name in mine.column_names:
            np.testing.assert_array_equal(column(mine, name), column(theirs, name))


def test_runs_that_share_submodels_have_their_own_true_changes(stored):
    swap = fs.Serving(ticks=100, drift=fs.Drift(fs.LabelSwap(cycle=4), at=50))
    other = fs.simulate(tiny.simulation(serving=swap, policy=fs.Never()), stored.path.parent, executor=fs.SerialExecutor(), progress=False)
    assert set(column(other.truth(), "change_at")) == {50}
    assert set(column(stored.truth(), "change_at")) == {-1, 40}


def test_a_run_without_drift_only_alarms_falsely(tmp_path):
    quiet = fs.simulate(tiny.simulation(serving=fs.Serving(ticks=100)), tmp_path, executor=fs.SerialExecutor(), progress=False)
    scores = quiet.scores()
    assert scores.num_changed == 0
    assert scores.detected == 0
    assert np.isnan(scores.accuracy_after)


def test_each_device_class_gets_what_it_can_hold(stored):
    table = stored.deployments()
    fleet = tiny.simulation().fleet
    strength = np.log(fleet.memory)
    sizes = column(table, "bytes")
    assert sizes[np.argmax(strength)] >= sizes[np.argmin(strength)]
    assert set(np.unique(column(table, "level"))) <= {0.0, 0.4, 0.6}
    assert (column(table, "sparsity") <= column(table, "level") + 1e-12).all()


def test_a_level_no_device_can_hold_is_refused_before_serving():
    too_large = tiny.simulation(capacity=fs.Capacity(scale="absolute", memory_share=1e-9), rounds=1)
    with pytest.raises(CapacityError, match=r"client 0 \(.*holds no level; the smallest needs"):
        list(fs.run(too_large))


def test_parts_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="rounds must be a whole number, at least 1, got 0"):
        tiny.simulation(rounds=0)
    with pytest.raises(ValueError, match="leaves nothing of"):
        tiny.simulation(serving=fs.Serving(ticks=20))
    with pytest.raises(ValueError, match="recovery_rounds trains universal submodels"):
        tiny.simulation(recovery_rounds=1)
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        tiny.simulation(device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_training_on_a_gpu_is_part_of_what_a_run_is_and_is_refused_where_there_is_none(tmp_path):
    there = tiny.simulation(device="cuda", rounds=1)
    assert digest(there) != digest(tiny.simulation(rounds=1))
    origin = Origin.of(there, gpu=False)
    assert train_digest(there, origin) != train_digest(tiny.simulation(rounds=1), origin)
    with pytest.raises(CapacityError, match="gpus_per_worker"):
        fs.simulate(there, tmp_path, executor=fs.SerialExecutor(), progress=False)


def test_recovered_universal_submodels_serve_with_their_own_weights(tmp_path):
    base = tiny.simulation()
    universal = replace(base, deployment=replace(base.deployment, calibration="global"), recovery_rounds=2)
    plain = replace(universal, recovery_rounds=0)
    accuracy = [fs.simulate(s, tmp_path, executor=fs.SerialExecutor(), progress=False).scores().accuracy_before for s in (plain, universal)]
    assert accuracy[1] > accuracy[0]


def test_losses_do_not_depend_on_the_policy_before_it_acts(stored):
    """Common random numbers: until the first redeployment every policy sees the same fleet."""
    never = fs.simulate(tiny.simulation(policy=fs.Never()), stored.path.parent, executor=fs.SerialExecutor(), progress=False)
    events = stored.events()
    first = column(events, "tick")[column(events, "kind") == "redeployment"].min()
    early = [column(run.ticks(), "loss")[column(run.ticks(), "tick") < first] for run in (stored, never)]
    np.testing.assert_array_equal(*early)


def test_sampled_activity_serves_only_the_active(tmp_path):
    from fedsim.stream import Sampled

    base = tiny.simulation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampled = replace(
            base, serving=replace(base.serving, activity=Sampled(6)), monitoring=fs.Monitoring(arl=500, calibration=10, recalibration=10)
        )
        run = fs.simulate(sampled, tmp_path, executor=fs.SerialExecutor(), progress=False)
    tick = column(run.ticks(), "tick")
    np.testing.assert_array_equal(np.bincount(tick), 6)
    assert np.isfinite(column(run.ticks(), "loss")).all()
