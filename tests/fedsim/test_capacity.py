import numpy as np
import pytest

import fedsim as fs
from fedsim.errors import CapacityError

SIZES, FLOPS = np.array([1000, 600, 400]), np.array([2000, 1200, 800])


def fleet(**columns):
    num = len(next(iter(columns.values())))
    given = {name: np.full(num, 1e6) for name in ("flops", "memory", "up", "down")} | columns
    return fs.Fleet.from_table(given)


def test_absolute_budgets_follow_the_device_by_hand():
    devices = fleet(memory=np.array([1e4, 9.9e3, 6e3, 4e3]))
    np.testing.assert_array_equal(fs.Capacity(scale="absolute", memory_share=0.1).levels(devices, SIZES, FLOPS), [0, 1, 1, 2])


def test_compute_and_link_bound_the_level_too():
    devices = fleet(flops=np.array([2000.0, 1999.0, 2000.0]), down=np.array([100.0, 100.0, 59.0]))
    levels = fs.Capacity(scale="absolute", memory_share=1.0, latency_seconds=1.0, download_seconds=10.0).levels(devices, SIZES, FLOPS)
    np.testing.assert_array_equal(levels, [0, 1, 2])


def test_a_device_that_holds_no_level_is_named_with_what_the_smallest_needs():
    with pytest.raises(CapacityError, match=r"client 1 .*holds no level; the smallest needs 400 bytes and 800 FLOPs"):
        fs.Capacity(scale="absolute", memory_share=1.0).levels(fleet(memory=np.array([1e6, 399.0])), SIZES, FLOPS)


def test_relative_budgets_always_fit_and_never_give_a_weaker_device_more():
    devices = fs.Fleet.sample(500, seed=3)
    levels = fs.Capacity().levels(devices, SIZES, FLOPS)
    assert set(levels) == {0, 1, 2}
    weaker = (
        (devices.memory[:, None] <= devices.memory) & (devices.flops[:, None] <= devices.flops) & (devices.down[:, None] <= devices.down)
    )
    assert (levels[:, None] >= levels)[weaker].all()


def test_submodels_of_ones_own_are_measured_one_by_one():
    own = np.stack([SIZES, SIZES - 1])
    devices = fleet(memory=np.array([999.0, 999.0]))
    np.testing.assert_array_equal(fs.Capacity(scale="absolute", memory_share=1.0).levels(devices, own, np.stack([FLOPS, FLOPS])), [1, 0])


@pytest.mark.parametrize(
    ("field", "value"), [("memory_share", 0.0), ("latency_seconds", -1.0), ("download_seconds", 0.0), ("scale", "guess")]
)
def test_fields_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        fs.Capacity(**{field: value})
