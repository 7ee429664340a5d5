import io
import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from detection import CUSUM, Gaussian, NormalScores
from detection.bank import Bank, TwoSided
from detection.focus import FOCuS
from detection.glr import MeanVarianceGLR
from detection.monitor import Alarm, Monitor

UP = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.0, 1.0), threshold=6.0, clip=4.0)
LOSSES = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.5, 1.0), threshold=9.0, clip=4.0)


def losses(streams, ticks, seed=0):
    """Gamma losses of streams of unequal scale."""
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, rng.uniform(0.1, 10.0, (streams, 1)), (streams, ticks))


def watched(monitor, x, active=None):
    """All alarms of ``x`` (N, T), in order."""
    return [alarm for tick, column in enumerate(x.T) for alarm in monitor.update(column, None if active is None else active[:, tick])]


def test_one_stream_gives_an_alarm_or_nothing():
    monitor = Monitor(UP)
    assert monitor.streams is None
    answers = [monitor.update(x) for x in [0.0] * 5 + [3.0] * 3]
    assert answers == [None] * 7 + [Alarm(tick=8, stream=0, changed_at=6, statistic=7.5)]
    assert monitor.streams == 1


def test_alarms_and_restarts_are_those_of_the_detector_driven_by_hand():
    x = np.random.default_rng(1).standard_normal((20, 300)) + (np.arange(300) > 150)
    state, clock, expected = UP.init(20), np.zeros(20, np.int64), []
    for tick, column in enumerate(x.T, start=1):
        state = UP.step(state, column)
        alarmed = UP.alarms(state)
        for row in np.flatnonzero(alarmed):
            changed, statistic = int(clock[row] + UP.changed_at(state)[row]), float(UP.statistic(state)[row])
            expected.append(Alarm(tick=tick, stream=int(row), changed_at=changed, statistic=statistic))
        clock[alarmed], state = tick, UP.restart(state, alarmed)
    alarms = watched(Monitor(UP), x)
    assert alarms == expected
    assert len(alarms) > 100


def test_two_alarms_in_one_tick_are_both_reported_in_the_order_of_streams():
    monitor = Monitor(UP)
    monitor.update([3.0, 0.0, 3.0])
    monitor.update([3.0, 0.0, 3.0])
    assert [alarm.stream for alarm in monitor.update([4.0, 0.0, 4.0])] == [0, 2]
    assert monitor.update([0.0, 0.0, 0.0]) == ()


def test_each_stream_counts_its_own_observations():
    monitor, idle = Monitor(UP), np.array([True, False])
    for _ in range(4):
        monitor.update([0.0, np.nan], idle)
    for x in (3.0, 3.0):
        monitor.update([x, x])
    assert monitor.update([4.0, 4.0]) == (
        Alarm(tick=7, stream=0, changed_at=5, statistic=8.5),
        Alarm(tick=3, stream=1, changed_at=1, statistic=8.5),
    )
    assert monitor.update([0.0, 0.0], np.array([False, False])) == ()


def test_a_stream_that_is_not_active_does_not_alarm_though_it_stands_at_the_threshold():
    monitor = Monitor(CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.0, 1.0), threshold=1.0))
    assert [alarm.stream for alarm in monitor.update([9.0, 9.0], np.array([True, False]))] == [0]


def test_the_learning_phase_standardises_streams_of_any_scale():
    x = losses(30, 400)
    x[:10, 300:] *= 4.0
    monitor = Monitor(LOSSES, calibration=150)
    for tick, column in enumerate(x.T):
        assert monitor.learning == (tick < 150)
        found = monitor.update(column)
        if tick < 150:
            assert found == ()
        elif tick < 300:
            assert len(found) <= 2
        for alarm in found:
            assert alarm.tick == tick + 1
            assert 150 < alarm.changed_at <= alarm.tick
    again = watched(Monitor(LOSSES, calibration=150), x)
    late = [alarm for alarm in again if alarm.tick > 300]
    assert {alarm.stream for alarm in late} >= set(range(10))
    assert np.median([next(a.changed_at for a in late if a.stream == row) for row in range(10)]) == pytest.approx(301, abs=3)


def test_the_learning_phase_is_the_transform_fitted_to_the_same_values():
    x, rng = losses(6, 200, seed=2), np.random.default_rng(3)
    active = rng.random(x.shape) < 0.8
    x[~active] = np.nan
    monitor = Monitor(LOSSES, calibration=120, transform=NormalScores(clip=3.0))
    alarms = watched(monitor, x, active)
    fitted = NormalScores(clip=3.0).fit(np.where(active, x, 1.0)[:, :120], active[:, :120])
    by_hand = Monitor(LOSSES)
    scores = fitted.transform(x[:, 120:])
    expected = watched(by_hand, scores, active[:, 120:])
    learned = active[:, :120].sum(axis=1)
    shifted = [(a.tick + learned[a.stream], a.stream, a.changed_at + learned[a.stream], a.statistic) for a in expected]
    assert [(a.tick, a.stream, a.changed_at, a.statistic) for a in alarms] == shifted


def test_an_infinite_loss_after_the_learning_phase_counts_as_the_clip():
    monitor = Monitor(LOSSES, calibration=60)
    watched(monitor, losses(3, 60))
    assert monitor.update([np.inf] * 3) == ()
    alarms = monitor.update([np.inf] * 3)
    assert [alarm.stream for alarm in alarms] == [0, 1, 2]
    assert {alarm.statistic for alarm in alarms} == {2 * (1.5 * 4.0 - 1.125)}


DETECTORS = [
    LOSSES,
    TwoSided(LOSSES, threshold=9.0),
    FOCuS(threshold=12.0, side="both"),
    MeanVarianceGLR(threshold=12.0, window=30),
    Bank.of_shifts(clip=4.0),
]


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: type(detector).__name__)
@pytest.mark.parametrize("stop", [1, 40, 80, 81, 150])
def test_a_stored_monitor_continues_bit_for_bit(detector, stop):
    x, rng = losses(4, 220, seed=4), np.random.default_rng(5)
    x[:, 160:] *= 5.0
    active = rng.random(x.shape) < 0.9
    active[0] = True
    monitor = Monitor(detector, calibration=80)
    watched(monitor, x[:, :stop], active[:, :stop])
    back = Monitor.from_bytes(monitor.to_bytes(), detector)
    assert back.to_bytes() == monitor.to_bytes()
    assert back.learning == monitor.learning
    alarms = watched(monitor, x[:, stop:], active[:, stop:])
    assert watched(back, x[:, stop:], active[:, stop:]) == alarms
    assert back.to_bytes() == monitor.to_bytes()
    assert alarms


def test_the_settings_of_the_transform_are_stored():
    monitor = Monitor(LOSSES, calibration=9, transform=NormalScores(clip=3.0, scale="identity", robust=True, min_calibration=5))
    monitor.update([1.0, -2.0])
    assert Monitor.from_bytes(monitor.to_bytes(), LOSSES).transform == monitor.transform


def stored():
    monitor = Monitor(LOSSES, calibration=8)
    for column in losses(2, 10).T:
        monitor.update(column)
    return monitor.to_bytes()


def test_no_changed_byte_goes_unnoticed():
    data = stored()
    for place in range(0, len(data), 13):
        for bit in (1, 64):
            damaged = bytearray(data)
            damaged[place] ^= bit
            try:
                back = Monitor.from_bytes(bytes(damaged), LOSSES)
            except ValueError:
                continue
            assert back.to_bytes() == data  # the byte was one that says nothing, such as a date


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"", lambda d: json.dumps({"a": 1}).encode()])
def test_damaged_bytes_are_refused(damage):
    with pytest.raises(ValueError, match="damaged"):
        Monitor.from_bytes(damage(stored()), LOSSES)


def test_bytes_of_another_detector_are_refused():
    for other in (FOCuS(threshold=9.0), UP):
        with pytest.raises(ValueError, match="detector must be the one that was stored"):
            Monitor.from_bytes(stored(), other)


def test_a_monitor_that_has_seen_nothing_has_nothing_to_store():
    with pytest.raises(ValueError, match="seen nothing"):
        Monitor(UP).to_bytes()


def test_another_number_of_streams_is_refused_and_changes_nothing():
    monitor = Monitor(UP)
    monitor.update([1.0, 2.0])
    before = monitor.to_bytes()
    for x in ([1.0], [1.0, 2.0, 3.0], 1.0):
        with pytest.raises(ValueError, match="each of the 2 streams"):
            monitor.update(x)
    assert monitor.to_bytes() == before


@pytest.mark.parametrize("calibration", [0, 5])
def test_a_missing_value_is_refused_and_changes_nothing(calibration):
    monitor = Monitor(UP, calibration=calibration)
    monitor.update([1.0, 2.0, 3.0])
    before = monitor.to_bytes()
    for x, active in (([0.0, np.nan, np.nan], None), ([0.0, np.nan, np.nan], np.array([True, False, True]))):
        with pytest.raises(ValueError, match=f"the first is stream {1 if active is None else 2}"):
            monitor.update(x, active)
    assert monitor.to_bytes() == before


def test_a_negative_loss_is_refused_when_it_comes_and_changes_nothing():
    monitor = Monitor(LOSSES, calibration=5)
    monitor.update([1.0, 2.0])
    before = monitor.to_bytes()
    with pytest.raises(ValueError, match="negative"):
        monitor.update([1.0, -2.0])
    assert monitor.to_bytes() == before


def test_a_refused_first_update_does_not_fix_the_number_of_streams():
    for calibration in (0, 5):
        monitor = Monitor(UP, calibration=calibration)
        with pytest.raises(ValueError, match="stream 0"):
            monitor.update([np.nan, 0.0])
        assert monitor.streams is None
        assert monitor.update([0.0, 0.0, 0.0]) == ()


@pytest.mark.parametrize("x", [np.zeros(0), np.zeros((2, 3, 4))])
def test_observations_of_no_stream_or_of_matrices_are_refused(x):
    with pytest.raises(ValueError, match="stream"):
        Monitor(UP).update(x)


def test_vectors_cannot_be_learned_from():
    with pytest.raises(ValueError, match="one number for each stream"):
        Monitor(UP, calibration=5).update(np.zeros((2, 3)))


def test_a_single_number_takes_no_mask():
    with pytest.raises(ValueError, match="active"):
        Monitor(UP).update(1.0, np.array([True]))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="calibration"):
        Monitor(UP, calibration=-1)
    with pytest.raises(ValueError, match="learning phase"):
        Monitor(UP, transform=NormalScores())


def test_a_fleet_without_spread_is_refused_at_the_end_of_the_learning_phase():
    monitor = Monitor(LOSSES, calibration=3)
    monitor.update([1.0, 1.0])
    monitor.update([1.0, 1.0])
    with pytest.raises(ValueError, match="constant"):
        monitor.update([1.0, 1.0])


def test_the_bytes_hold_no_pickle():
    with np.load(io.BytesIO(stored()), allow_pickle=False) as arrays:
        assert_array_equal(arrays["seen"], [10, 10])
