"""Fleets: columns that hold what they promise, from samples and from tables."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsim.encoding import decode, digest, encode
from fedsim.fleet import MIXES, DeviceClass, Fleet
from fedsim.partition import BySize, Dirichlet
from fedsim.tasks.base import Dataset

COLUMNS = ("flops", "memory", "up", "down", "availability", "device", "group", "region")
TABLE = {"flops": [1e9, 2e9, 3e9], "memory": [1e6, 2e6, 3e6], "up": [1e3, 2e3, 3e3], "down": [4e3, 5e3, 6e3]}


def assert_equal_fleets(a: Fleet, b: Fleet) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.device_names, a.partition, a.seed) == (b.device_names, b.partition, b.seed)


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_has_at_least_four_classes_in_their_shares(mix: str) -> None:
    fleet = Fleet.sample(20_000, devices=mix, seed=1)
    assert len(fleet.device_names) >= 4
    shares = np.array([d.share for d in MIXES[mix]])
    np.testing.assert_allclose(np.bincount(fleet.device) / 20_000, shares / shares.sum(), atol=0.015)


def test_columns_have_the_medians_and_spreads_of_their_class() -> None:
    (kind,) = kinds = (DeviceClass(name="one", share=2.0, flops=1e9, memory=1e8, up=1e5, down=1e6, spread=0.4, link_spread=0.8),)
    fleet = Fleet.sample(50_000, devices=kinds, seed=0)
    for name, spread in (("flops", 0.4), ("memory", 0.4), ("up", 0.8), ("down", 0.8)):
        logs = np.log(getattr(fleet, name) / getattr(kind, name))
        assert abs(np.median(logs)) < 0.02
        assert logs.std() == pytest.approx(spread, rel=0.02)
    np.testing.assert_allclose(fleet.down / fleet.up, 10.0)  # one radio
    assert abs(np.corrcoef(np.log(fleet.flops), np.log(fleet.down))[0, 1]) < 0.02


def test_a_sample_is_a_function_of_its_seed_and_a_longer_one_begins_with_the_shorter() -> None:
    assert_equal_fleets(Fleet.sample(100, seed=3), Fleet.sample(100, seed=3))
    short, long = Fleet.sample(100, seed=3), Fleet.sample(1000, seed=3)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:100])
    assert not np.array_equal(short.flops, Fleet.sample(100, seed=4).flops)


def test_groups_are_neighbourhoods_in_the_unit_square() -> None:
    fleet = Fleet.sample(5000, seed=0, groups=3)
    assert set(fleet.group) == {0, 1, 2}
    assert fleet.region.min() >= 0
    assert fleet.region.max() <= 1
    for g in range(3):
        assert fleet.region[fleet.group == g].std(axis=0).max() < 0.12


def test_a_million_clients_cost_a_second_and_little_memory() -> None:
    tracemalloc.start()
    start = time.perf_counter()
    fleet = Fleet.sample(1_000_000, seed=0)
    seconds = time.perf_counter() - start
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(fleet) == 1_000_000
    assert size < 70e6
    assert peak < 200e6
    assert seconds < 3.0  # 0.4 s alone; the bound leaves room for a busy machine


def test_a_fleet_survives_encoding() -> None:
    fleet = Fleet.sample(50, partition=Dirichlet(alpha=0.3, by="domain"), seed=7)
    again = decode(*encode(fleet))
    assert_equal_fleets(fleet, again)
    assert digest(fleet) == digest(again) != digest(Fleet.sample(50, seed=7))


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_saved_fleet_is_read_back_client_for_client(tmp_path: Path, suffix: str) -> None:
    fleet = Fleet.sample(200, seed=2)
    fleet.save(tmp_path / f"fleet.{suffix}")
    again = Fleet.from_table(tmp_path / f"fleet.{suffix}", seed=2)
    for name in ("flops", "memory", "up", "down", "availability", "group", "region"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fleet, name))
    np.testing.assert_array_equal(np.array(again.device_names)[again.device], np.array(fleet.device_names)[fleet.device])


@pytest.mark.parametrize("form", [dict, pd.DataFrame])
def test_a_table_needs_four_columns_and_fills_in_the_rest(form: Any) -> None:
    fleet = Fleet.from_table(form(TABLE))
    np.testing.assert_array_equal(fleet.down, TABLE["down"])
    np.testing.assert_array_equal(fleet.availability, 1.0)
    np.testing.assert_array_equal(fleet.group, 0)
    assert fleet.device_names == ("device",)
    assert np.isnan(fleet.region).all()


def test_a_table_may_name_devices_groups_and_places() -> None:
    frame = pd.DataFrame(
        {**TABLE, "device": ["b", "a", "b"], "group": [4, 5, 4], "region_u": [0.1, 0.2, 0.3], "region_v": [0.0, 1.0, 0.5], "x": 0}
    )
    fleet = Fleet.from_table(frame)
    assert fleet.device_names == ("a", "b")
    np.testing.assert_array_equal(fleet.device, [1, 0, 1])
    np.testing.assert_array_equal(fleet.group, [4, 5, 4])
    np.testing.assert_array_equal(fleet.region[1], [0.2, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": None}, r"lacks column\(s\) up; it has flops, memory, down"),
        ({"memory": [1e6, float("nan"), 3e6]}, "column memory, row 1: must be positive and finite, got nan"),
        ({"flops": [1e9, 1e9, float("inf")]}, "column flops, row 2: .*got inf"),
        ({"down": [0.0, 1.0, 1.0]}, "column down, row 0: .*got 0.0"),
        ({"up": [1.0, -2.0, 1.0]}, "column up, row 1: .*got -2.0"),
        ({"up": [1.0, None, 1.0]}, "column up, row 1: .*got nan"),
        ({"up": ["fast", "slow", "slow"]}, "column up must hold numbers"),
        ({"up": [1.0, 2.0]}, "one length, got flops 3, memory 3, up 2"),
        ({"availability": [0.5, 0.0, 1.0]}, r"column availability, row 1: must lie in \(0, 1\]"),
        ({"availability": [0.5, 1.0]}, "one length"),
        ({"group": [0.0, 0.5, 1.0]}, "column group, row 1: must be a whole number"),
        ({"group": [0, 2**40, 1]}, "column group, row 1: must be a whole number"),
        ({"device": ["a", None, "b"]}, "column device, row 1: must be a name"),
        ({"region_u": [0.1, 0.2, 0.3]}, "region_u and region_v must be given together"),
        ({"region_u": [0.1, 1.2, 0.3], "region_v": [0.1, 0.2, 0.3]}, "column region, row 1: must lie in the unit square"),
        ({"region_u": [0.1, float("nan"), 0.3], "region_v": [0.1, 0.2, 0.3]}, "column region, row 1"),
        ({name: [] for name in TABLE}, "at least one client"),
    ],
)
def test_bad_tables_are_refused_naming_column_and_row(change: dict[str, Any], message: str) -> None:
    table = {name: column for name, column in {**TABLE, **change}.items() if column is not None}
    with pytest.raises(ValueError, match=message):
        Fleet.from_table(table)


def test_bad_files_are_refused_naming_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        Fleet.from_table(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"must end in \.parquet or \.csv"):
        Fleet.from_table("fleet.xlsx")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"broken\.parquet is not a readable"):
        Fleet.from_table(tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match="got a int"):
        Fleet.from_table(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "at least 1"),
        ({"num": 5, "devices": "mainframes"}, "choose from mixed-phones, edge-mix"),
        ({"num": 5, "devices": ()}, "1 to 127 device classes"),
        ({"num": 5, "devices": MIXES["edge-mix"][:1] * 2}, "different names"),
        ({"num": 5, "groups": 0}, "groups must be at least 1"),
    ],
)
def test_bad_samples_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fleet.sample(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops": -1.0}, "flops of device class 'x'"),
        ({"availability": 1.5}, "availability"),
        ({"spread": -0.1}, "spread"),
        ({"share": 0.0}, "share"),
    ],
)
def test_bad_device_classes_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeviceClass(**{"name": "x", "share": 1.0, "flops": 1e9, "memory": 1e9, "up": 1e6, "down": 1e6, **change})


def test_shards_follow_the_partition_and_empty_ones_are_announced() -> None:
    dataset = Dataset(np.zeros((9, 1), np.float32), np.arange(9) % 3)
    assert Fleet.sample(4, seed=0).shards(dataset).sizes.tolist() == [3, 2, 2, 2]
    fleet = Fleet.sample(4, partition=BySize(sizes=(0, 4, 5, 0)), seed=0)
    with pytest.warns(UserWarning, match="2 of 4 clients hold no examples"):
        assert fleet.shards(dataset).sizes.tolist() == [0, 4, 5, 0]
