"""Ray gives the serial executor's bits; lost workers change nothing; what cannot work is one clear error, soon."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.communication import DynamicFL
from fedsim.encoding import digest
from fedsim.errors import CapacityError, ClientError, WorkerError
from fedsim.fleet import Fleet
from fedsim.partition import LabelShards
from fedsim.rounds import Training
from fedsim.runtime import Needs, RayExecutor, SerialExecutor
from fedsim.strategies import FedAvg
from fedsim.tasks import Digits

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # by value, because a worker cannot import a test module
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=150 * 2**20)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def two(cluster):
    with RayExecutor(workers=2) as executor:
        yield executor


# ---------------------------------------------------------------- equal bits


def trained(executor, *, unit_blocks=None, lanes=2, task=None, rounds=2):
    prepared = Training.prepare(
        task=task or Digits(),
        fleet=Fleet.sample(30, partition=LabelShards(labels_per_client=1), seed=0),
        strategy=FedAvg(client_lr=0.05, cohort=9, local_steps=6, batch_size=8, momentum=0.5),
        communication=DynamicFL(high=2, budget=0.5),
        rounds=rounds,
        seed=3,
        executor=executor,
        lanes=lanes,
        unit_blocks=unit_blocks,
    )
    state, records = prepared.init(), []
    while state.round < rounds:
        state, record = prepared.step(state)
        records.append(record)
    return digest(state, *records)


@pytest.fixture(scope="module")
def reference():
    return trained(SerialExecutor())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_and_any_units_give_the_serial_digest(workers, reference):
    with RayExecutor(workers=workers) as executor:
        for unit_blocks in (None, 1, 2, 4):
            assert trained(executor, unit_blocks=unit_blocks) == reference


@dataclass(frozen=True)
class Deadly(Digits):
    """Digits whose loss kills its worker, once, in the middle of the second round."""

    flag: str = ""
    driver: int = 0
    calls_before: int = 12

    def losses(self, model, batch):
        global CALLS
        CALLS += 1
        if os.getpid() != self.driver and self.calls_before < CALLS and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(model, batch)


CALLS = 0


def test_a_worker_killed_in_mid_round_changes_no_bit(tmp_path):
    task = Deadly(flag=str(tmp_path / "killed"), driver=os.getpid())
    with RayExecutor(workers=2) as executor:
        before = executor.pids()
        seen = trained(executor, task=task, lanes=1)
        assert Path(task.flag).exists()
        assert len(set(executor.pids()) & set(before)) == 1
    assert seen == trained(SerialExecutor(), task=task, lanes=1)


# ---------------------------------------------------------------- maps


def pausing(unit, shared, cache):
    time.sleep(0.02 * (unit % 3))
    return unit * unit, os.getpid()


def test_results_come_in_unit_order_from_several_workers(two):
    results = two.map(pausing, list(range(12)), {})
    assert [r[0] for r in results] == [u * u for u in range(12)]
    assert {r[1] for r in results} <= set(two.pids())


def test_workers_killed_from_outside_are_replaced_and_their_units_done_again(two):
    first = two.pids()
    killer = threading.Timer(0.15, lambda: [os.kill(pid, signal.SIGKILL) for pid in first])
    killer.start()
    results = two.map(pausing, list(range(40)), {})
    killer.join()
    assert [r[0] for r in results] == [u * u for u in range(40)]
    assert not set(two.pids()) & set(first)


def properties(unit, shared, cache):
    array = shared["array"]
    seen = cache.setdefault("ids", id(array))
    return array.flags.writeable, float(array.sum()), seen == id(array)


def test_shared_arrays_arrive_read_only_and_are_unpacked_once(two):
    handle = two.share({"x": np.ones(10)}["x"])
    for _ in range(2):
        assert two.map(properties, list(range(6)), {"array": handle}) == [(False, 10.0, True)] * 6


def filled(unit, shared, cache):
    """Pages faulted in while arrays of 8 MB come and go, four at a time, eight times."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        held = [torch.full((2_000_000,), float(i)) for i in range(4)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_worker_keeps_the_memory_that_units_free_for_the_next():
    with RayExecutor(workers=1) as executor:
        _, *later = executor.map(filled, range(3), {})
    four = 4 * 8_000_000 // 4096
    assert max(later) < 2 * four, "given back, they would be faulted in eight times"


def slow_at_first(unit, shared, cache):
    """Unit 5 takes a minute where it is done first."""
    marker = Path(shared["marker"])
    if unit == 5 and not marker.exists():
        marker.touch()
        time.sleep(60)
    time.sleep(0.05)
    return unit * unit


def test_a_slow_unit_is_done_again_by_an_idle_worker(tmp_path):
    shared = {"marker": str(tmp_path / "begun")}
    with RayExecutor(workers=2, twice=True) as executor:
        start = time.monotonic()
        assert executor.map(slow_at_first, range(6), shared) == [0, 1, 4, 9, 16, 25]
        assert (tmp_path / "begun").exists()
        assert executor.map(slow_at_first, [3, 4], shared) == [9, 16], "the other worker goes on"
        assert time.monotonic() - start < 30


def test_an_empty_map_is_empty(two):
    assert two.map(pausing, [], {}) == []


def failing(unit, shared, cache):
    if unit == 3:
        try:
            raise KeyError("broken picture")
        except KeyError as error:
            raise ClientError("bad data", client=17, round=2) from error
    return unit


def test_a_clients_error_arrives_with_its_cause_and_the_workers_go_on(two):
    with pytest.raises(ClientError, match="client 17 failed in round 2: bad data") as caught:
        two.map(failing, list(range(8)), {})
    assert isinstance(caught.value.__cause__, KeyError)
    assert two.map(failing, [0, 1], {}) == [0, 1]


class UnsendableError(Exception):
    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def raising_unsendable(unit, shared, cache):
    raise UnsendableError()


def test_an_exception_that_cannot_be_sent_is_named(two):
    with pytest.raises(WorkerError, match="UnsendableError: holds a lock"):
        two.map(raising_unsendable, [0], {})


def dying(unit, shared, cache):
    if unit == 1:
        os._exit(1)
    return unit


def test_a_unit_lost_three_times_is_given_up_by_name(two):
    with pytest.raises(WorkerError, match=r"stage run: unit 1 \(1\) was lost 3 times"):
        two.map(dying, [0, 1, 2], {})
    assert two.map(dying, [0, 2], {}) == [0, 2]


@dataclass(frozen=True)
class Guarded:
    name: str
    inner: object


@pytest.mark.parametrize("where", ["shared", "handle", "unit"])
def test_what_cannot_be_sent_is_named_by_its_path(two, where):
    value = Guarded("x", {"key": threading.Lock()})
    send = {
        "handle": lambda: two.share(value),
        "shared": lambda: two.map(pausing, [1], {"task": value}),
        "unit": lambda: two.map(pausing, [value], {}),
    }[where]
    with pytest.raises(TypeError, match=r"\.inner\['key'\], a _thread\.lock, cannot be sent to a worker"):
        send()


def lock(unit, shared, cache):
    return threading.Lock()


def test_a_result_that_cannot_be_sent_is_an_error_not_a_hang(two):
    with pytest.raises(WorkerError, match="unit 0"):
        two.map(lock, [0], {})


@pytest.fixture
def heeding_ctrl_c():
    """A process started in the background of a shell inherits that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_a_map_and_leaves_the_workers_usable(two):
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        two.map(sleeping, list(range(100)), {})
    assert [r[0] for r in two.map(pausing, [1, 2], {})] == [1, 4]


def sleeping(unit, shared, cache):
    time.sleep(0.1)


# ---------------------------------------------------------------- what cannot work


def test_a_gpu_that_is_not_there_is_an_error_within_a_second(two):
    start = time.monotonic()
    with pytest.raises(CapacityError, match="need 1 GPU, the cluster has 0"):
        RayExecutor(workers=1, gpus_per_worker=1)
    with pytest.raises(CapacityError, match="a unit needs 1 GPU"):
        two.map(pausing, [1], {}, Needs(gpus=1))
    assert time.monotonic() - start < 1


def test_more_workers_than_the_cluster_holds_is_an_error_at_once():
    with pytest.raises(CapacityError, match="64 workers need 64 CPU, the cluster has 4"):
        RayExecutor(workers=64)


def test_workers_that_others_hold_are_an_error_after_patience(two):
    with pytest.raises(CapacityError, match="did not start in 1 s"):
        RayExecutor(workers=3, patience_seconds=1.0)


def broken_setup():
    raise ImportError("no module named kornia")


def test_a_worker_that_cannot_start_is_an_error_with_its_cause():
    with pytest.raises(WorkerError, match=r"stage start.*no module named kornia"):
        RayExecutor(workers=1, setup=broken_setup)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"gpus_per_worker": -1.0}])
def test_bad_arguments_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RayExecutor(**bad)
