import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import trim_mean

from detection import CUSUM, Gaussian
from detection.diagnosis import common_movement, diagnose, trimmed_variance

DETECTOR = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.0, 1.0), threshold=5.0)
TICKS, CLIENTS, AT = 150, 400, 101


def fleet(seed=0, shock=0.0, drifted=0, shift=1.5, scale=1.0, onset=AT):
    """Standard normal clients; a common shock from tick `AT` on; the first `drifted` of them changed from `onset` on."""
    u = np.random.default_rng(seed).standard_normal((TICKS, CLIENTS))
    u[onset - 1 :, :drifted] = scale * u[onset - 1 :, :drifted] + shift
    u[AT - 1 :] += shock
    return u


def test_the_common_movement_is_scipys_trimmed_mean_of_the_active_clients():
    rng = np.random.default_rng(1)
    u, active = rng.standard_normal((30, 50)), rng.random((30, 50)) < 0.7
    active[4] = False
    found = common_movement(u, active, trim=0.1)
    expected = [trim_mean(row[there], 0.1) if there.any() else np.nan for row, there in zip(u, active, strict=True)]
    assert_allclose(found, expected)


@pytest.mark.parametrize("trim", [0.0, 0.1, 0.25])
def test_the_variance_of_the_trimmed_mean_is_that_of_simulated_ones(trim):
    u = np.random.default_rng(2).standard_normal((8000, 100))
    assert 100 * common_movement(u, np.ones(u.shape, bool), trim=trim).var() == pytest.approx(trimmed_variance(trim), rel=0.05)


def test_a_quiet_fleet_has_neither():
    for seed in range(10):
        found = diagnose(fleet(seed), detector=DETECTOR)
        assert found.shock is None
        assert not found.changed.any()
    assert found.kind == "none"
    assert np.isnan(found.onset_spread)
    assert str(found) == "no common shock; 0 of 400 clients drifted"


@pytest.mark.parametrize("size", [1.5, -1.5])
def test_a_common_shock_is_reported_as_common_and_raises_no_clients(size):
    for seed in range(10):
        found = diagnose(fleet(seed, shock=size), detector=DETECTOR)
        assert found.shock is not None
        assert found.shock.at == AT
        assert found.shock.size == pytest.approx(size, abs=0.05)
        assert not found.changed.any()
        assert found.raw.all() == (size > 0)  # read client by client, a shock upwards looks like drift everywhere


def test_drift_of_five_per_cent_of_the_clients_is_found_and_located_without_a_shock():
    found = [diagnose(fleet(seed, drifted=20), detector=DETECTOR) for seed in range(10)]
    hits = np.mean([d.changed[:20].mean() for d in found])
    false_share = np.mean([d.changed[20:].sum() / d.changed.sum() for d in found])
    errors = np.concatenate([d.since[:20][d.changed[:20]] - AT for d in found])
    assert all(d.shock is None for d in found)
    assert hits > 0.98
    assert false_share <= 0.1
    assert (np.abs(errors) <= 3).mean() > 0.8
    assert all(d.onset_spread <= 4 for d in found)
    assert all(d.kind == "mean" for d in found)
    assert np.mean([d.mean for d in found]) == pytest.approx(1.5, abs=0.15)


def test_strong_drift_of_eight_per_cent_of_the_clients_is_still_no_shock():
    for seed in range(10):
        found = diagnose(fleet(seed, drifted=32, shift=4.0), detector=DETECTOR)
        assert found.shock is None
        assert found.changed[:32].all()


def test_a_shock_and_drift_at_once_are_told_apart():
    found = diagnose(fleet(3, shock=2.0, drifted=20, onset=61), detector=DETECTOR)
    assert found.shock is not None
    assert found.shock.at == AT
    assert_array_equal(np.flatnonzero(found.changed), np.arange(20))
    assert abs(np.median(found.since[:20]) - 61) <= 2
    assert found.raw.all()


def test_clients_that_grow_noisier_are_a_change_of_scale():
    found = diagnose(fleet(4, drifted=20, shift=0.3, scale=3.0, onset=31), detector=DETECTOR)
    assert found.kind == "scale"
    assert found.scale == pytest.approx(3.0, rel=0.15)
    assert found.changed[:20].sum() >= 10


def test_onsets_far_apart_are_spread():
    u = fleet(5)
    for client, onset in enumerate(range(21, 121, 5)):
        u[onset - 1 :, client] += 2.0
    found = diagnose(u, detector=DETECTOR)
    assert found.changed[:20].all()
    assert found.onset_spread == pytest.approx(50, abs=12)


def test_absent_clients_and_empty_ticks_change_neither_ticks_nor_verdicts():
    active = np.random.default_rng(6).random((TICKS, CLIENTS)) < 0.6
    active[40:45] = False
    u = np.where(active, fleet(6, shock=1.5, drifted=20, shift=2.0, onset=61), np.nan)
    found = diagnose(u, active, detector=DETECTOR)
    assert np.isnan(found.common[40:45]).all()
    assert found.shock is not None
    assert found.shock.at == AT
    assert_array_equal(np.flatnonzero(found.changed), np.arange(20))
    assert abs(np.median(found.since[:20]) - 61) <= 2


def test_a_shock_at_the_first_tick_has_no_before():
    u = np.random.default_rng(7).standard_normal((30, 100)) + 1.0
    found = diagnose(u, detector=DETECTOR)
    assert found.shock is not None
    assert found.shock.at == 1
    assert found.shock.size == pytest.approx(1.0, abs=0.1)


def test_bad_input_is_named():
    u = np.zeros((5, 30))
    for arguments, message in [
        ({"u": np.zeros(5)}, "shape"),
        ({"u": np.full((5, 30), np.inf)}, "finite"),
        ({"u": u, "active": np.ones((5, 30))}, "active"),
        ({"u": u, "least": 31}, "31 active"),
        ({"u": u, "trim": 0.5}, "trim"),
        ({"u": u, "alpha": 0.0}, "alpha"),
    ]:
        with pytest.raises(ValueError, match=message):
            diagnose(detector=DETECTOR, **arguments)
