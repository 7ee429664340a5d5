import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fedsim as fs
from fedsim.branching import fork_directory
from fedsim.runs.schema import column
from fedsim.runs.store import RunStore

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return fs.simulate(
        tiny.simulation(), tmp_path_factory.mktemp("runs"), executor=fs.SerialExecutor(), progress=False, recipe="tiny.py:simulation"
    )


@pytest.mark.parametrize("at", [0, 25, 52, 99])
def test_a_fork_with_the_same_policy_reproduces_the_tables(stored, at):
    forked = fs.fork(stored, at=at, policy=stored.simulation.policy, executor=fs.SerialExecutor(), progress=False)
    assert forked.path != stored.path
    assert forked.path == fork_directory(stored, at=at, policy=stored.simulation.policy)
    assert forked.recipe == stored.recipe == "tiny.py:simulation"
    assert forked.digest() == stored.digest()


def test_a_fork_with_another_policy_differs_only_from_its_tick_on(stored):
    forked = fs.fork(stored, at=60, policy=fs.Periodic(every=10, latency=2, window=16), executor=fs.SerialExecutor(), progress=False)
    for name in ("tick", "client", "loss", "statistic"):
        mine, theirs = column(stored.ticks(), name), column(forked.ticks(), name)
        early = column(stored.ticks(), "tick") < 60
        np.testing.assert_array_equal(mine[early], theirs[early])
    asked = [column(run.events(), "tick")[column(run.events(), "kind") == "request"] for run in (stored, forked)]
    np.testing.assert_array_equal(asked[0][asked[0] < 60], asked[1][asked[1] < 60])
    assert (asked[1] >= 60).sum() > (asked[0] >= 60).sum()


def test_a_tick_outside_the_run_is_refused(stored):
    with pytest.raises(ValueError, match="at must be a tick of the run, 0 to 99, got 100"):
        fs.fork(stored, at=100, policy=fs.Never())


@pytest.mark.parametrize("writes", [3, 6, 9])
def test_a_fork_killed_while_it_takes_over_is_continued(stored, monkeypatch, tmp_path, writes):
    left = [writes]

    def counted(method):
        def write(store, *args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return method(store, *args, **kwargs)

        return write

    arguments = {"at": 52, "policy": stored.simulation.policy, "out": tmp_path, "executor": fs.SerialExecutor(), "progress": False}
    with monkeypatch.context() as patched:
        for name in ("write_part", "save_checkpoint"):
            patched.setattr(RunStore, name, counted(getattr(RunStore, name)))
        with pytest.raises(KeyboardInterrupt):
            fs.fork(stored, **arguments)
    (path,) = (p.parent for p in tmp_path.glob("*/config.json"))
    resumed = fs.simulate(RunStore.open(path).simulation(), tmp_path, executor=fs.SerialExecutor(), progress=False)
    assert resumed.path == path
    assert resumed.digest() == stored.digest()
