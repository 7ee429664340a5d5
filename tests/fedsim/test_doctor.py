"""The doctor: every failed check says what to do, and the law it tests can be seen to fail."""

import json
import os
import sys

import pytest

from fedsim import doctor, lanes
from fedsim.doctor import Finding, examine, width_law


@pytest.fixture
def findings(tmp_path):
    return {finding.name: finding for finding in examine(tmp_path / "runs", ray=False)}


def test_a_machine_that_runs_these_tests_is_healthy(findings):
    assert {"python", "packages", "cores", "memory", "torch", "gpus", "lanes", "runs", "temporary", "telemetry"} <= set(findings)
    assert [f for f in findings.values() if f.state == "failed"] == []


def test_whatever_is_not_well_says_what_to_do(findings):
    assert all(f.remedy for f in findings.values() if f.state != "ok")
    assert all(not f.remedy for f in findings.values() if f.state == "ok")


def test_looking_leaves_nothing_behind(findings, tmp_path):
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_bits_of_a_client_do_not_depend_on_its_neighbours(model):
    assert width_law(model) == ""


def test_unpadded_blocks_of_convolutions_break_the_law(monkeypatch):
    monkeypatch.setattr(lanes, "padded", lambda count, width: count)
    broken = width_law("cnn")
    if not broken:
        pytest.skip("kernels of this machine round alike at every width")
    assert broken.startswith("client ")
    assert doctor._lanes().state == "failed"
    assert "lanes=1" in doctor._lanes().remedy


def test_a_place_where_nothing_can_be_written_is_found():
    place = "/proc/fedsim" if sys.platform == "linux" else "/nowhere"
    (runs,) = (f for f in examine(place, ray=False) if f.name == "runs")
    assert runs.state == "failed"
    assert "--out" in runs.remedy


def test_a_package_that_is_missing_or_old_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda extra: {"numpy": "99.1", "no-such-package": "2.0"})
    found = doctor._packages()
    assert found.state == "failed"
    assert "no-such-package is missing" in found.text
    assert found.remedy == "pip install 'numpy>=99.1' 'no-such-package>=2.0'"


@pytest.mark.parametrize(("version", "least", "met"), [("2.10.0", "2.9", True), ("2.13.0+cpu", "2.11", True), ("1.9", "1.10", False)])
def test_versions_are_compared_as_numbers(monkeypatch, version, least, met):
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    assert doctor._is_met("some", least) == met


def test_a_check_that_breaks_is_a_finding(monkeypatch, tmp_path):
    def broken():
        raise OSError("no such counter")

    monkeypatch.setattr(doctor, "_memory", broken)
    (memory,) = (f for f in examine(tmp_path, ray=False) if f.name == "memory")
    assert (memory.state, memory.text) == ("failed", "OSError: no such counter")


def test_a_control_group_bounds_cores_and_memory(monkeypatch):
    group = {"cpu.max": "150000 100000", "memory.max": "500000000", "memory.current": "100000000"}
    monkeypatch.setattr(doctor, "_control_group", group.get)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert doctor.usable_cores() == 1.5
    assert doctor.available_memory() == 4e8
    assert doctor._memory().state == "failed"


def test_findings_read_as_lines():
    assert str(Finding("ray", "ok", "there")) == "ok      ray         there"
    assert str(Finding("ray", "failed", "gone", "start it")).splitlines()[1].strip() == "-> start it"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_is_started_and_asked():
    found = doctor._ray(None)
    assert found.state == "ok", found.text
    assert found.text.startswith("started and stopped: a worker after")


def test_a_cluster_that_is_not_there_is_told_at_once():
    found = doctor._ray("127.0.0.1:1")
    assert found.state == "failed"
    assert "nobody answers at 127.0.0.1:1" in found.text
    assert "ray start --head" in found.remedy


def test_a_process_that_dies_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    assert doctor._ray(None).text == "exit code 1"


def test_the_way_to_ray_reports_seconds_as_json(monkeypatch, capsys):
    from fedsim.runtime import ray
    from fedsim.runtime.serial import SerialExecutor

    monkeypatch.setattr(ray, "RayExecutor", lambda address, workers: SerialExecutor())
    doctor.reach("")
    assert set(json.loads(capsys.readouterr().out)) == {"start", "trip"}
