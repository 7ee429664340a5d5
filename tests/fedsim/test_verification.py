"""Stored runs are trained again in part: an honest one passes, and whatever was changed in it afterwards is found and named."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedsim as fs
from fedsim import encoding
from fedsim.errors import CheckpointError
from fedsim.runs.run import Run
from fedsim.runs.schema import column
from fedsim.runs.store import RunStore
from fedsim.strategies import FedBuff
from fedsim.verification import Mismatch, verify

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

SHORT = {"serving": fs.Serving(ticks=12), "monitoring": fs.Monitoring(calibration=10, recalibration=10), "evaluate_every": 50}


def short(**changes):
    """Many rounds of training of small blocks, a moment of serving."""
    return tiny.simulation(**{**SHORT, "lanes": 4, "deployment": fs.GISP(levels=(0.0,), calibration="global"), **changes})


def simulated(place, **changes):
    return fs.simulate(short(**changes), place, executor=fs.SerialExecutor(), progress=False)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Fifteen rounds: models are stored after 10 and 15."""
    return simulated(tmp_path_factory.mktemp("runs"), rounds=15)


@pytest.fixture
def copied(honest, tmp_path):
    """A copy that a test may spoil."""
    path = tmp_path / "runs" / honest.path.name
    shutil.copytree(honest.path, path)
    return Run(path)


def test_an_honest_run_passes(honest):
    found = verify(honest)
    assert found.ok
    assert "all equal" in found.table()


def test_every_block_of_every_round_can_be_compared(honest):
    found = verify(honest, blocks=1000, reach=None)
    stored = set(zip(*(column(honest.clients(), name).tolist() for name in ("round", "block")), strict=True))
    assert (found.ok, found.blocks, found.models, found.rounds) == (True, len(stored), 2, tuple(range(15)))


def test_within_reach_only_what_is_drawn_is_trained_again(honest):
    found = verify(honest, blocks=2, reach=1)
    assert found.ok
    assert found.blocks == 2
    assert set(found.rounds) <= {0, 10}
    assert "rounds 1-9, 11-14" in found.table()


def test_the_draw_is_a_function_of_its_seed(honest):
    rounds = [verify(honest, blocks=1, seed=seed, reach=4).rounds for seed in (0, 0, 1, 2, 3)]
    assert rounds[0] == rounds[1]
    assert len(set(rounds)) > 1


def part_of(run, round):
    """Path and columns of the part file that holds ``round``."""
    store = RunStore.open(run.path)
    index, path = next((i, p) for i, p in store._parts("clients") if i > round)
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read()
    return index, {name: column(table, name) for name in table.column_names}


@pytest.mark.parametrize("reach", [2, 10])
def test_a_hash_that_was_changed_is_found_with_its_round_and_clients(copied, reach):
    index, columns = part_of(copied, 11)
    rows = np.flatnonzero((columns["round"] == 11) & (columns["block"] == columns["block"][columns["round"] == 11][0]))
    true, clients = columns["block"][rows[0]], tuple(columns["client"][rows].tolist())
    columns["block"][rows] = "0" * 16
    with RunStore.open(copied.path) as store:
        store.lock()
        store.write_part("clients", index, columns)
    found = verify(copied, blocks=1000, reach=reach)
    assert found.mismatches == (Mismatch(11, clients, "0" * 16, str(true)),)
    listed = ", ".join(map(str, clients))
    assert f"round 11, clients {listed}: stored 0000000000000000, found {true}" in found.table()


def spoil(run, index, change):
    """Store another training state, with a digest that fits it."""
    with RunStore.open(run.path) as store:
        store.lock()
        state = store.checkpoint("train", index)
        store.save_checkpoint("train", index, replace(state, params=change(state.params)))


def test_a_stored_model_that_was_changed_is_found_from_both_sides(copied):
    spoil(copied, 10, lambda params: params + np.float32(1e-6))
    found = verify(copied, blocks=1000)
    assert {m.round for m in found.mismatches if not m.clients} == {9, 14}, (
        "it is not what its rounds give, nor do its rounds give the next"
    )
    assert {m.round for m in found.mismatches if m.clients} == {10, 11, 12, 13, 14}


def test_a_last_model_that_was_changed_is_found(copied):
    spoil(copied, 15, np.negative)
    (mismatch,) = verify(copied, blocks=1000).mismatches
    assert (mismatch.round, mismatch.clients) == (14, ())
    assert "the stored model after it" in str(mismatch)


def test_a_damaged_checkpoint_is_named(copied):
    path = copied.path / "checkpoints" / "train-000010.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"train-000010\.npz is damaged"):
        verify(copied)


def test_other_lanes_in_a_doctored_config_are_found(copied):
    other = replace(copied.simulation, lanes=8)
    config = json.loads((copied.path / "config.json").read_text())
    config |= {"simulation": encoding.encode(other)[0], "digest": encoding.digest(other)}
    (copied.path / "config.json").write_text(json.dumps(config))
    found = verify(Run(copied.path), blocks=1)
    assert not found.ok
    assert found.mismatches[0].clients


def test_what_has_changed_since_the_run_was_made_is_told(copied):
    with RunStore.open(copied.path) as store:
        store.lock()
        origin = store.checkpoint("origin", 0)
        store.save_checkpoint("origin", 0, replace(origin, torch="1.0"), keep=True)
    assert "not as it was when the run was made: torch" in verify(copied).table()


def test_a_run_that_was_interrupted_can_be_verified(copied):
    shutil.rmtree(copied.path / "checkpoints")
    (copied.path / "checkpoints").mkdir()
    found = verify(copied, blocks=1000)
    assert found.ok
    assert found.rounds == tuple(range(10)), "only the seed's model is left to begin from"


@pytest.mark.parametrize(
    "changes",
    [
        {"communication": fs.RandomGroup(high=4, low=32, size=3)},
        {"strategy": fs.Scaffold(client_lr=0.05, cohort=8, local_steps=8), "communication": fs.FedSGD()},
        {"strategy": FedBuff(client_lr=0.05, buffer=10, concurrency=8, local_steps=8)},
        {"strategy": fs.FedAvg(client_lr=0.05, cohort=8, local_epochs=0.5), "communication": fs.Uniform(), "lanes": 2},
        {"deadline": fs.Deadline(seconds=2.0, over_select=1.5), "dropout": fs.Dropout(probability=0.3), "communication": fs.Uniform()},
        {"strategy": fs.HeteroFL(client_lr=0.05, cohort=8, local_steps=8, widths=fs.Widths(rates=(1.0, 0.5), shares=(1, 1)))},
        {"strategy": fs.FedAvg(client_lr=0.05, cohort=8, local_steps=8, compression=fs.ErrorFeedback(inner=fs.TopK(share=0.1)))},
    ],
    ids=["mixed", "scaffold", "buffered", "epochs", "dropout", "widths", "compressed"],
)
def test_every_kind_of_training_can_be_verified(changes, tmp_path):
    run = simulated(tmp_path, **{"rounds": 12, "communication": fs.Uniform(), **changes})
    for reach, rounds in ((1, (0, 10)), (10, tuple(range(12)))):
        found = verify(run, blocks=1000, reach=reach)
        assert found.ok, found.table()
        assert found.rounds == rounds


def test_verifying_leaves_the_run_as_it_is(honest):
    before = {p: p.stat().st_mtime_ns for p in honest.path.rglob("*")}
    verify(honest)
    assert {p: p.stat().st_mtime_ns for p in honest.path.rglob("*")} == before


def test_what_cannot_be_drawn_is_refused(honest):
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        verify(honest, blocks=0)
    with pytest.raises(ValueError, match="reach must be at least 1 round"):
        verify(honest, reach=0)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_verify_what_one_process_made(honest):
    with fs.RayExecutor(workers=2) as executor:
        assert verify(honest, blocks=1000, reach=None, executor=executor).ok
