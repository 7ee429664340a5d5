"""Clusters of several nodes, a node that dies, a store and a memory that are full: each ends as the serial run does, or with one clear error."""

import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

import fedsim as fs
from fedsim.encoding import digest
from fedsim.errors import CapacityError
from fedsim.rounds import Training
from fedsim.runtime import Needs

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster():
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def slow_sum(unit, shared, cache):
    time.sleep(0.15)
    return float(shared["values"].sum() * unit)


def trained(executor, rounds=3):
    training = Training.prepare(
        task=fs.tasks.Digits(hidden=(16,)),
        fleet=fs.Fleet.sample(24, partition=fs.LabelShards(2), seed=0),
        strategy=fs.Scaffold(cohort=16, local_steps=6, batch_size=8),
        communication=fs.Uniform(),
        rounds=rounds,
        seed=0,
        executor=executor,
        lanes=2,
        unit_blocks=1,
    )
    state, records = training.init(), []
    while state.round < rounds:
        state, record = training.step(state)
        records.append(record)
    return digest(state, records)


def test_a_node_that_dies_in_a_map_changes_no_result(cluster):
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    values = np.arange(300_000.0)
    with fs.RayExecutor(address=cluster.address, workers=2, patience_seconds=20) as executor:
        shared = {"values": executor.share(values)}
        assert executor.map(slow_sum, [1, 2], shared) == [values.sum(), 2 * values.sum()]
        killer = threading.Timer(1.0, cluster.remove_node, (second,), {"allow_graceful": False})
        killer.start()
        found = executor.map(slow_sum, list(range(20)), shared)
        killer.join()
        assert found == [float(values.sum() * unit) for unit in range(20)]
        assert executor.map(slow_sum, [3], shared) == [3 * values.sum()]


def test_training_on_two_nodes_gives_the_bits_of_this_process(cluster):
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    with fs.RayExecutor(address=cluster.address, workers=2) as executor:
        assert trained(executor) == trained(fs.SerialExecutor())


DRIVER = """
import ray
from fedsim.runtime.ray import RayExecutor

def length(unit, shared, cache):
    return len(unit)

with RayExecutor(address="auto", workers=1) as executor:
    print(len(ray.nodes()), executor.map(length, [[1, 2], [3]], {}))
"""


def test_a_driver_finds_a_running_cluster_by_itself(cluster, tmp_path):
    """What ``ray job submit`` starts is such a driver: it joins the cluster named by the environment."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("1 [2, 1]"), done.stderr[-2000:]


def test_a_cluster_that_merely_runs_on_this_machine_is_not_joined_unasked(cluster):
    with fs.RayExecutor(workers=1) as executor:
        assert executor.map(slow_sum, [2], {"values": np.ones(3)}) == [6.0]
        assert ray.get_runtime_context().gcs_address != cluster.address


JOB = f"""
import fedsim as fs
from fedsim.encoding import digest
from fedsim.rounds import Training

{inspect.getsource(trained)}
with fs.RayExecutor(workers=2) as executor:
    print("RESULT", trained(executor), len({{member.node for member in executor._members}}))
"""


def test_a_job_sent_to_a_cluster_of_two_nodes_trains_there_to_the_same_bits(tmp_path):
    pytest.importorskip("aiohttp_cors", reason="ray job submit needs ray[default]")
    port = _free_port()
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": port, "dashboard_agent_listen_port": _free_port()}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(num_cpus=1, dashboard_agent_listen_port=_free_port())
        made.wait_for_nodes()
        (tmp_path / "job.py").write_text(JOB)
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        command = [Path(sys.executable).with_name("ray"), "job", "submit", f"--address=http://127.0.0.1:{port}", "--", sys.executable]
        command.append(tmp_path / "job.py")
        until = time.monotonic() + 90
        while True:  # until the cluster's agents are up
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
            if "No available agent" not in done.stderr or time.monotonic() > until:
                break
            time.sleep(2)
        assert f"RESULT {trained(fs.SerialExecutor())} 2" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    finally:
        made.shutdown()


def _free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def where(unit, shared, cache):
    """The worker, and whether it sees a GPU; unit 3 kills its worker once."""
    if unit == 3 and not Path(shared["killed"]).exists():
        Path(shared["killed"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return os.getpid(), bool(os.environ.get("CUDA_VISIBLE_DEVICES"))


def test_units_that_need_a_gpu_and_others_draw_from_one_queue(tmp_path):
    ray.init(num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with fs.RayExecutor(workers=3, gpu_workers=1) as executor:
            needs = [Needs(gpus=float(unit % 3 == 0)) for unit in range(24)]
            found = executor.map(where, range(24), {"killed": str(tmp_path / "killed")}, needs, [1.0] * 24)
            assert (tmp_path / "killed").exists()
            assert all(gpu for _, gpu in found[::3]), "its replacement has the GPU"
            without = {pid for pid, gpu in found if not gpu}
            assert len(without) == 2
            assert without.isdisjoint(pid for pid, gpu in found if gpu)
            with pytest.raises(CapacityError, match=r"a unit needs 2 GPU"):
                executor.map(where, [0], {}, Needs(gpus=2.0))
    finally:
        ray.shutdown()


def heavy_result(unit, shared, cache):
    return np.full(5_000_000, float(unit))


def test_a_store_smaller_than_the_results_spills_says_so_once_and_gives_them_all():
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=150 * 2**20, log_to_driver=False)
    try:
        with fs.RayExecutor(workers=1) as executor:
            with pytest.warns(RuntimeWarning, match="of an object store of 150 MiB.*object_store_memory=BYTES") as said:
                found = executor.map(heavy_result, list(range(12)), {})
            assert len(said) == 1
            assert [float(v[0]) for v in found] == list(range(12))
            assert sum(v.nbytes for v in found) > 400 * 2**20
    finally:
        ray.shutdown()


def greedy(unit, shared, cache):
    if unit == 1:
        hoard = []
        while True:
            hoard.append(np.ones(2**24))  # 128 MiB, every page touched
            time.sleep(0.02)
    return unit


def test_a_unit_that_eats_the_memory_is_named_with_what_to_do(monkeypatch):
    import psutil

    memory = psutil.virtual_memory()
    used = 1 - memory.available / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{min(0.95, used + 0.1):.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with fs.RayExecutor(workers=1) as executor:
            with pytest.raises(CapacityError, match=r"unit 1 .*memory.*fewer workers"):
                executor.map(greedy, [0, 1, 2], {})
            assert executor.map(greedy, [0, 2], {}) == [0, 2]
    finally:
        ray.shutdown()
