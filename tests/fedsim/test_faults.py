"""Same bits on any number of workers and units, with workers killed, and with the driver killed and resumed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fedsim as fs
from fedsim.errors import CheckpointError
from fedsim.runs.store import RunStore
from fedsim.simulation import deploy_stage, serve_steps, train_steps

TINY = Path(__file__).with_name("tiny.py")
spec = importlib.util.spec_from_file_location("tiny", TINY)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return fs.simulate(tiny.simulation(), tmp_path_factory.mktemp("serial"), executor=fs.SerialExecutor(), progress=False)


def final_parameters(run):
    return RunStore.open(run.path).latest_checkpoint("train")[1].params


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_ray_workers_gives_the_tables_of_the_serial_run(reference, tmp_path, workers):
    with fs.RayExecutor(workers=workers) as executor:
        run = fs.simulate(tiny.simulation(), tmp_path, executor=executor, progress=False)
    assert run.digest() == reference.digest()
    np.testing.assert_array_equal(final_parameters(run), final_parameters(reference))


class Killer:
    """Passes maps on to a Ray executor, and kills one of its workers while the map of ``name`` number ``call`` is under way."""

    def __init__(self, executor, name, call):
        self.executor, self.name, self.call = executor, name, call
        self.workers, self.gpus_per_worker = executor.workers, executor.gpus_per_worker
        self.calls, self.killed = 0, False

    def share(self, value):
        return self.executor.share(value)

    def map(self, fn, units, shared, *needs):
        if fn.__name__ == self.name:
            self.calls += 1
            if self.calls == self.call:
                os.kill(self.executor.pids()[0], signal.SIGKILL)
                self.killed = True
        return self.executor.map(fn, units, shared, *needs)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), [("train_unit", 5), ("serve_block", 3), ("react", 2)])
def test_a_worker_killed_in_training_serving_or_repruning_changes_nothing(reference, tmp_path, name, call):
    with fs.RayExecutor(workers=2) as executor:
        killer = Killer(executor, name, call)
        run = fs.simulate(tiny.simulation(), tmp_path, executor=killer, progress=False)
    assert killer.killed, f"{name} was called {killer.calls} times"
    assert run.digest() == reference.digest()
    np.testing.assert_array_equal(final_parameters(run), final_parameters(reference))


@pytest.mark.slow
def test_a_driver_killed_at_three_moments_ends_with_the_same_tables(tmp_path):
    """Moments drawn at random from the time an undisturbed driver takes."""
    calm = tmp_path / "calm"
    start = time.perf_counter()
    subprocess.run([sys.executable, TINY, calm], check=True)
    duration = time.perf_counter() - start
    expected = fs.Run(next(calm.glob("tiny-*"))).digest()
    for moment in np.random.default_rng(0).uniform(0.4, 0.95, 3):
        place = tmp_path / f"killed-{moment:.3f}"
        driver = subprocess.Popen([sys.executable, TINY, place])
        time.sleep(moment * duration)
        driver.kill()
        driver.wait()
        subprocess.run([sys.executable, TINY, place], check=True)
        assert fs.Run(next(place.glob("tiny-*"))).digest() == expected


class Died(BaseException):
    """Stands for SIGKILL between two commits: nothing may catch it."""


def test_a_driver_that_dies_at_any_commit_resumes_to_the_same_tables(reference, tmp_path, monkeypatch):
    write, save, limit = RunStore.write_part, RunStore.save_checkpoint, [0]

    def counted(action):
        def commit(self, *arguments, **options):
            limit[0] -= 1
            if limit[0] == 0:
                raise Died
            return action(self, *arguments, **options)

        return commit

    monkeypatch.setattr(RunStore, "write_part", counted(write))
    monkeypatch.setattr(RunStore, "save_checkpoint", counted(save))
    deaths = 0
    for commit in range(1, 60, 4):
        limit[0] = commit
        try:
            run = fs.simulate(tiny.simulation(), tmp_path / str(commit), executor=fs.SerialExecutor(), progress=False)
        except Died:
            deaths += 1
            limit[0] = 10**9
            run = fs.simulate(tiny.simulation(), tmp_path / str(commit), executor=fs.SerialExecutor(), progress=False)
        else:
            break
        assert run.digest() == reference.digest(), f"died at commit {commit}"
    assert deaths >= 4


def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_tables(reference, tmp_path, monkeypatch):
    from fedsim.serving import Server

    step = Server.step

    def interrupted(self, state):
        if state.tick == 61:
            raise KeyboardInterrupt
        return step(self, state)

    monkeypatch.setattr(Server, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fs.simulate(tiny.simulation(), tmp_path, executor=fs.SerialExecutor(), progress=False)
    path = next(tmp_path.glob("tiny-*"))
    assert fs.Run(path).status() == "interrupted"
    monkeypatch.undo()
    assert fs.resume(path, executor=fs.SerialExecutor(), progress=False).digest() == reference.digest()


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, monkeypatch):
    from fedsim.serving import Server

    def interrupted(self, state):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fs.simulate(tiny.simulation(), tmp_path, executor=fs.SerialExecutor(), progress=False)
    path = next(tmp_path.glob("tiny-*"))
    checkpoint = path / "checkpoints" / "train-000008.npz"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"train-000008\.npz is damaged"):
        fs.resume(path, executor=fs.SerialExecutor(), progress=False)


def test_a_run_directory_of_another_simulation_is_refused(reference, tmp_path):
    other = tmp_path / reference.path.name
    other.mkdir()
    config = json.loads((reference.path / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"digest": "0" * 32}))
    with pytest.raises(CheckpointError, match="holds another simulation"):
        fs.simulate(tiny.simulation(), tmp_path, executor=fs.SerialExecutor(), progress=False)


def test_final_parameters_do_not_depend_on_the_size_of_units():
    """The negative control, a fold in another order, stands with the round's own tests."""
    from fedsim.rounds import Training

    simulation = tiny.simulation()
    found = []
    for unit_blocks in (1, 2, 4):
        training = Training.prepare(
            task=simulation.task,
            fleet=simulation.fleet,
            strategy=simulation.strategy,
            communication=simulation.communication,
            rounds=2,
            seed=0,
            executor=fs.SerialExecutor(),
            lanes=2,
            unit_blocks=unit_blocks,
        )
        state = training.init()
        for _ in range(2):
            state, _ = training.step(state)
        found.append(state.params)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_step_leaves_the_state_it_started_from_as_it_was():
    from fedsim import encoding

    simulation, executor = tiny.simulation(), fs.SerialExecutor()
    for step in train_steps(simulation, executor):
        trained = step.state
    deployed, _ = deploy_stage(simulation, trained, executor)
    before = None
    for number, step in enumerate(serve_steps(simulation, trained.params, deployed, executor)):
        if before is not None:
            assert encoding.digest(before[0]) == before[1]
        if number % 10 == 0 or 40 <= number < 60:
            before = step.state, encoding.digest(step.state)
