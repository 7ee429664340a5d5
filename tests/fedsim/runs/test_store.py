"""The run directory: nothing half written, nobody else's run touched, and the same tables however they were cut."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import CheckpointError
from fedsim.records import Alarm, Deployment, Event, Redeployment, Round, Tick
from fedsim.runs import files
from fedsim.runs.run import Run
from fedsim.runs.schema import SCHEMAS, arrow_table, column, tabulate
from fedsim.runs.store import RunStore, run_directory

TRUSTED = (__name__.partition(".")[0],)
HOLD = "import sys; from pathlib import Path; from fedsim.runs import files; files.lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


@dataclass(frozen=True)
class Plan:
    name: str = "Two words"
    seed: int = 3
    rates: np.ndarray = field(default_factory=lambda: np.arange(4.0))


def events(*ticks):
    return tabulate([Event(tick=t, client=0, kind="alarm", statistic=np.nan) for t in ticks])["events"]


def create(tmp_path, plan=None, **options):
    return RunStore.create(tmp_path, plan or Plan(), trusted=TRUSTED, **options)


def test_a_new_run_has_a_readable_config_and_environment(tmp_path):
    with create(tmp_path, recipe="mine.py:small") as store:
        assert store.path.name.startswith("two-words-")
        config = json.loads((store.path / "config.json").read_text())
        assert store.path.name.endswith(config["digest"][:8])
        assert config["recipe"] == "mine.py:small"
        assert config["simulation"]["fields"]["seed"] == 3
        environment = json.loads((store.path / "environment.json").read_text())
        assert environment["seed"] == 3
        assert environment["packages"]["numpy"] == np.__version__
        rebuilt = store.simulation()
        assert (rebuilt.name, rebuilt.seed) == ("Two words", 3)
        np.testing.assert_array_equal(rebuilt.rates, np.arange(4.0))


def test_the_same_simulation_reopens_its_directory_and_another_one_gets_its_own(tmp_path):
    with create(tmp_path) as first:
        first.write_part("events", 1, events(1))
    with create(tmp_path) as again:
        assert again.path == first.path
        assert len(again.table("events")) == 1
    with create(tmp_path, replace(Plan(), seed=4)) as other:
        assert other.path != first.path


def test_a_directory_of_another_simulation_is_refused(tmp_path):
    with create(tmp_path, replace(Plan(), seed=4)) as other:
        pass
    other.path.rename(run_directory(tmp_path, Plan()))
    with pytest.raises(CheckpointError, match="holds another simulation"):
        create(tmp_path)
    assert not (run_directory(tmp_path, Plan()) / "lock.json").exists()


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    path = run_directory(tmp_path, Plan())
    path.mkdir()
    (path / "thesis.tex").write_text("do not touch")
    with pytest.raises(CheckpointError, match="not a run directory"):
        create(tmp_path)
    assert [p.name for p in path.iterdir()] == ["thesis.tex"]


def test_opening_what_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="no run directory"):
        RunStore.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        RunStore.open(tmp_path)


def test_a_driver_killed_before_the_config_leaves_a_usable_directory(tmp_path):
    path = run_directory(tmp_path, Plan())
    (path / "checkpoints").mkdir(parents=True)
    (path / ".config.json.123.partial").write_text("{")
    with create(tmp_path) as store:
        assert store.config()["recipe"] is None


def test_an_edited_config_is_noticed(tmp_path):
    with create(tmp_path) as store:
        config = store.path / "config.json"
        config.write_text(config.read_text().replace('"seed": 3', '"seed": 5'))
        with pytest.raises(CheckpointError, match="edited"):
            store.simulation()
        config.write_text("{")
        with pytest.raises(CheckpointError, match="damaged"):
            RunStore.open(store.path)


def test_two_drivers_cannot_hold_one_run(tmp_path):
    with create(tmp_path), pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        create(tmp_path)
    with create(tmp_path):
        pass


def test_a_lock_is_held_by_a_living_process_and_taken_over_from_a_killed_one(tmp_path):
    lock = tmp_path / "lock.json"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid}"):
            files.lock(lock)
        holder.send_signal(signal.SIGKILL)
    files.lock(lock)
    assert files.lock_holder(lock) == files.Driver.current()


def test_a_process_id_used_again_does_not_keep_a_lock(tmp_path):
    lock = tmp_path / "lock.json"
    me = files.Driver.current()
    files.write_json(lock, {"host": me.host, "pid": me.pid, "started": me.started - 1})
    files.lock(lock)
    assert files.lock_holder(lock) == me


def test_of_two_who_take_over_a_stale_lock_one_wins(tmp_path, monkeypatch):
    lock = tmp_path / "lock.json"
    me = files.Driver.current()
    quicker = replace(me, pid=os.getppid(), started=files._start_time(os.getppid()))
    files.write_json(lock, asdict(replace(me, started=-1)))  # no process starts at -1
    alive = files.Driver.may_be_alive

    def beaten_to_it(driver):
        if driver.started == -1:
            lock.write_text(json.dumps(asdict(quicker)))  # the other one took over between our look and our act
            return False
        return alive(driver)

    monkeypatch.setattr(files.Driver, "may_be_alive", beaten_to_it)
    with pytest.raises(CheckpointError, match=f"in use by process {quicker.pid}"):
        files.lock(lock)
    assert files.lock_holder(lock) == quicker
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_a_copy_under_another_name_is_opened_locked_and_written(tmp_path):
    with create(tmp_path) as store:
        store.save_checkpoint("train", 1, 1)
        copied = Path(shutil.copytree(store.path, tmp_path / "copied", ignore=shutil.ignore_patterns("lock.json", "checkpoints")))
    copy = RunStore.open(copied)
    copy.lock()
    with copy:
        assert copy.latest_checkpoint("train") is None
        copy.save_checkpoint("train", 2, 2)
        copy.mark_complete()
    assert (copy.status(), store.status()) == ("complete", "interrupted")
    assert store.checkpoints("train") == [1]


def test_a_lock_of_another_host_is_respected(tmp_path):
    files.write_json(tmp_path / "lock.json", {"host": "elsewhere", "pid": 1, "started": 0})
    with pytest.raises(CheckpointError, match="elsewhere"):
        files.lock(tmp_path / "lock.json")


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 29), max_size=5))
def test_the_fingerprint_does_not_depend_on_where_parts_are_cut(tmp_path_factory, cuts):
    digests = []
    for edges in ([30], sorted({*cuts, 30})):
        with create(tmp_path_factory.mktemp("runs")) as store:
            for start, stop in zip([0, *edges], edges, strict=False):
                store.write_part("events", stop, events(*range(start, stop)))
            digests.append(Run(store.path).digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("change", [{"tick": 6}, {"detail": "x"}, {"loss_dense": 0.5}, {"client": 1}])
def test_the_fingerprint_sees_every_cell(tmp_path, change):
    digests = []
    for seed, fields in enumerate([{}, change]):
        with create(tmp_path, Plan(seed=seed)) as store:
            store.write_part("events", 5, tabulate([replace(Event(tick=5, client=0), **fields)])["events"])
            digests.append(Run(store.path).digest())
    assert digests[0] != digests[1]


def test_parts_past_a_checkpoint_are_dropped_and_others_stay(tmp_path):
    with create(tmp_path) as store:
        for index in (10, 20, 1_000_000, 30):
            store.write_part("events", index, events(index))
        store.drop_parts_after("events", 20)
        assert column(store.table("events"), "tick").tolist() == [10, 20]
        store.write_part("events", 20, events(21))
        assert column(store.table("events"), "tick").tolist() == [10, 21]
        assert (store.path / "events-000010.parquet").is_file()


def test_a_table_without_parts_is_empty_and_typed(tmp_path):
    with create(tmp_path) as store:
        for name, schema in SCHEMAS.items():
            table = store.table(name)
            assert len(table) == 0
            assert table.schema.equals(schema)
        with pytest.raises(ValueError, match="unknown table 'ticking'"):
            store.table("ticking")


def test_a_damaged_part_is_named(tmp_path):
    with create(tmp_path) as store:
        store.write_part("events", 7, events(7))
        (store.path / "events-000007.parquet").write_bytes(b"PAR1 oh dear")
        with pytest.raises(CheckpointError, match=r"events-000007\.parquet is damaged"):
            store.table("events")


def test_parts_are_read_without_us(tmp_path):
    with create(tmp_path) as store:
        store.write_part("events", 1, events(1, 2))
        assert pq.read_table(store.path / "events-000001.parquet").to_pydict()["tick"] == [1, 2]


def test_the_last_two_checkpoints_stay_and_those_to_keep(tmp_path):
    with create(tmp_path) as store:
        assert store.latest_checkpoint("train") is None
        for index in range(0, 60, 10):
            store.save_checkpoint("train", index, {"params": np.full(3, index)}, keep=index == 20)
        store.save_checkpoint("serve", 5, "other")
        assert store.checkpoints("train") == [20, 40, 50]
        index, state = store.latest_checkpoint("train")
        assert index == 50
        np.testing.assert_array_equal(state["params"], np.full(3, 50))
        np.testing.assert_array_equal(store.checkpoint("train", 20)["params"], np.full(3, 20))
        with pytest.raises(CheckpointError, match="only at"):
            store.checkpoint("train", 30)


def test_a_damaged_checkpoint_is_named_and_the_older_one_is_still_there(tmp_path):
    with create(tmp_path) as store:
        for index in (10, 20):
            store.save_checkpoint("train", index, index)
        file = store.path / "checkpoints" / "train-000020.npz"
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(CheckpointError, match=r"damaged.*delete .*train-000020\.npz to continue from 10"):
            store.latest_checkpoint("train")
        file.unlink()
        assert store.latest_checkpoint("train") == (10, 10)


def test_a_full_disk_is_a_checkpoint_error_and_leaves_what_was_there(tmp_path, monkeypatch):
    def no_space(_):
        raise OSError(28, "No space left on device")

    with create(tmp_path) as store:
        store.write_part("events", 1, events(1))
        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(CheckpointError, match="No space left"):
            store.write_part("events", 2, events(2))
        with pytest.raises(CheckpointError, match="No space left"):
            store.save_checkpoint("train", 1, 1)
        monkeypatch.undo()
        assert column(store.table("events"), "tick").tolist() == [1]
        assert not [p for p in store.path.rglob("*") if p.name.endswith(".partial")]


def test_status_tells_running_from_interrupted_from_complete(tmp_path):
    with create(tmp_path) as store:
        assert store.status() == "running"
    assert store.status() == "interrupted"
    with create(tmp_path) as store:
        store.mark_complete()
    assert RunStore.open(store.path).status() == "complete"


def test_records_become_rows_of_their_tables():
    per_client = {name: np.arange(2) for name in SCHEMAS["clients"].names if name != "round"} | {"block": np.array(["a", "a"])}
    scalars = dict.fromkeys(SCHEMAS["rounds"].names, 1) | {"note": ""}
    at = {name: np.arange(3) for name in SCHEMAS["ticks"].names if name != "tick"}
    fleet = {name: np.arange(3) for name in SCHEMAS["deployments"].names} | {"device": np.array(["a", "b", "a"])}
    records = [
        Round(**scalars, cohort=np.arange(2), group=np.arange(1), clients=per_client),
        Deployment(clients=fleet),
        Tick(tick=0, clients=at),
        Alarm(tick=0, client=1),
        Tick(tick=1, clients=at),
        Redeployment(tick=1, client=1, bytes=8),
    ]
    tables = {name: arrow_table(name, columns) for name, columns in tabulate(records).items()}
    assert {name: len(t) for name, t in tables.items()} == {"rounds": 1, "clients": 2, "deployments": 3, "ticks": 6, "events": 2}
    assert column(tables["events"], "kind").tolist() == ["alarm", "redeployment"]
    assert column(tables["ticks"], "tick").tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"client": [1], "drift": [0]}, "missing .'change_at'."),
        ({"client": [1], "drift": [0], "change_at": [1], "nu": [1]}, "unknown .'nu'."),
        ({"client": [1, 2], "drift": [0], "change_at": [1]}, "differ in length"),
        ({"client": [1], "drift": [0.5], "change_at": [1]}, "'drift' .* holds int64"),
    ],
)
def test_columns_that_do_not_fit_the_schema_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        arrow_table("truth", columns)


def test_a_run_is_shown_by_its_path(tmp_path):
    with create(tmp_path) as store:
        run = Run(store.path, simulation="the value at hand")
    assert run.simulation == "the value at hand"
    assert isinstance(run.path, Path)
    assert "interrupted" in repr(run)
