"""Streams whose model was replaced learn their law again; everybody else goes on as if nothing had happened."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from detection import CUSUM, Gaussian, NormalScores
from detection.bank import Bank, TwoSided
from detection.focus import FOCuS
from detection.glr import MeanVarianceGLR
from detection.monitor import Alarm, Monitor

LOSSES = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.5, 1.0), threshold=9.0, clip=4.0)
LOW = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.0, 1.0), threshold=3.0, clip=4.0)  # alarms often, in control too
DETECTORS = [
    LOW,
    TwoSided(LOW, threshold=3.0),
    FOCuS(threshold=5.0, side="both"),
    MeanVarianceGLR(threshold=5.0, window=30),
    Bank.of_shifts(clip=4.0),
]
every = pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: type(detector).__name__)


def losses(streams, ticks, seed=0):
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, rng.uniform(0.1, 10.0, (streams, 1)), (streams, ticks))


def dropouts(x, seed=1, share=0.2):
    """Which of ``x`` (N, T) are there; the others are set to ``nan``."""
    active = np.random.default_rng(seed).random(x.shape) >= share
    x[~active] = np.nan
    return active


def watched(monitor, x, active=None, redeployed=None):
    """All alarms of ``x`` (N, T), in order; ``redeployed`` maps a tick (from 0) to the streams that relearn before it."""
    alarms = []
    for tick, column in enumerate(x.T):
        if redeployed and tick in redeployed:
            monitor.relearn(redeployed[tick])
        alarms += monitor.update(column, None if active is None else active[:, tick])
    return alarms


def chosen(streams, *rows):
    mask = np.zeros(streams, dtype=bool)
    mask[list(rows)] = True
    return mask


def by_hand(detector, x, active, redeployed, calibration, relearning, transform):
    """The same as a plain loop: one stream's buffer a list, one refit at a time."""
    streams, alarms = len(x), []
    scores = transform.fit(np.where(active, x, 1.0)[:, :calibration], active[:, :calibration])
    state = detector.init(streams)
    seen = active[:, :calibration].sum(axis=1)
    before, buffers = seen.copy(), {}
    for tick in range(calibration, x.shape[1]):
        for row in np.flatnonzero(redeployed.get(tick, [])):
            buffers[row], before[row] = [], seen[row]
            state = detector.restart(state, chosen(streams, row))
        there = active[:, tick]
        seen += there
        watching = there & ~np.isin(np.arange(streams), list(buffers))
        state = detector.step(state, scores.transform(x[:, tick]), watching)
        for row in np.flatnonzero(watching & detector.alarms(state)):
            changed = int(before[row] + detector.changed_at(state)[row])
            alarms.append(Alarm(tick=int(seen[row]), stream=int(row), changed_at=changed, statistic=float(detector.statistic(state)[row])))
        restarted = watching & detector.alarms(state)
        before[restarted], state = seen[restarted], detector.restart(state, restarted)
        for row in [row for row in buffers if there[row]]:
            buffers[row].append(x[row, tick])
            before[row] = seen[row]
            if len(buffers[row]) == relearning:
                scores = scores.refit(chosen(streams, row), np.array([buffers.pop(row)]))
    return alarms


@every
@pytest.mark.parametrize("robust", [False, True])
def test_relearning_is_a_refit_by_hand_with_dropouts_and_streams_at_different_places(detector, robust):
    x = losses(6, 260, seed=2)
    x[:3, 100:] *= 5.0
    x[:, 230:] *= 5.0
    active = dropouts(x)
    redeployed = {100: chosen(6, 0, 1), 110: chosen(6, 2), 115: chosen(6, 1), 200: chosen(6, 0, 4)}
    transform = NormalScores(robust=robust)
    monitor = Monitor(detector, calibration=60, relearning=20, transform=transform)
    alarms = watched(monitor, x, active, redeployed)
    assert alarms == by_hand(detector, x, active, redeployed, 60, 20, transform)
    assert {alarm.stream for alarm in alarms} == set(range(6))


@every
def test_all_other_streams_go_on_untouched_bit_for_bit(detector):
    x = losses(5, 200, seed=3)
    x[:, 90:] *= 2.0
    active = dropouts(x)
    redeployed = {90: chosen(5, 1, 3), 150: chosen(5, 3)}
    with_it, without = Monitor(detector, calibration=60, relearning=20), Monitor(detector, calibration=60, relearning=20)
    one, other = watched(with_it, x, active, redeployed), watched(without, x, active)
    kept = [0, 2, 4]
    assert [a for a in one if a.stream in kept] == [a for a in other if a.stream in kept]
    assert [a for a in one if a.stream not in kept] != [a for a in other if a.stream not in kept]


def test_a_redeployment_without_relearning_is_an_alarm_again_and_again_and_with_it_there_are_as_few_as_in_control():
    streams, calm, after = 40, 150, 400
    x = losses(streams, calm + after, seed=4)
    before = watched(Monitor(LOSSES, calibration=calm), x)
    x[:, calm:] *= 3.0  # the new model's level, in control
    moved = chosen(streams, *range(streams))
    with_it = watched(Monitor(LOSSES, calibration=calm, relearning=50), x, redeployed={calm: moved})
    without = watched(Monitor(LOSSES, calibration=calm, relearning=50), x)
    assert len(without) > 20 * streams
    assert len(with_it) <= len(before) + streams // 4


def test_a_change_after_relearning_is_found_and_counted_among_the_streams_own_observations():
    x = losses(30, 400, seed=5)
    x[:10, 150:] *= 3.0
    active = np.ones(x.shape, dtype=bool)
    active[0, 160:170] = False
    x[:10, 300:] *= 4.0
    monitor = Monitor(LOSSES, calibration=150, relearning=60)
    alarms = watched(monitor, x, active, {150: chosen(30, *range(10))})
    first = {row: next(alarm for alarm in alarms if alarm.stream == row and alarm.tick > 280) for row in range(10)}
    for row, alarm in first.items():
        away = 10 if row == 0 else 0
        assert 301 - away <= alarm.tick < 320
        assert alarm.changed_at == pytest.approx(301 - away, abs=6)
    assert all(alarm.tick > 150 + 60 and alarm.changed_at > 150 + 60 for alarm in alarms if alarm.stream < 10)


def test_a_stream_is_not_watched_until_it_has_seen_enough_of_its_own_observations():
    monitor = Monitor(LOSSES, calibration=40, relearning=3)
    assert monitor.watched is None
    x = losses(3, 60, seed=6)
    watched(monitor, x[:, :20])
    assert not monitor.watched.any()
    watched(monitor, x[:, 20:40])
    assert monitor.watched.all()
    monitor.relearn(chosen(3, 1))
    idle, seen = np.array([True, False, True]), []
    for tick, active in enumerate([None, idle, None, idle, None, None]):
        monitor.update(np.where(active is idle, [1.0, np.nan, 1.0], x[:, 40 + tick]), active)
        seen.append(bool(monitor.watched[1]))
        assert monitor.watched[[0, 2]].all()
    assert seen == [False, False, False, False, True, True]
    assert not monitor.learning


def test_relearning_again_forgets_what_was_learned_so_far():
    x = losses(4, 120, seed=7)
    once, twice = Monitor(LOSSES, calibration=40, relearning=20), Monitor(LOSSES, calibration=40, relearning=20)
    watched(once, x, redeployed={70: chosen(4, 2)})
    watched(twice, x, redeployed={60: chosen(4, 2), 70: chosen(4, 2)})
    untouched = Monitor(LOSSES, calibration=40, relearning=20)
    watched(untouched, x)
    laws = [monitor._law.scores for monitor in (once, twice, untouched)]
    assert_array_equal(laws[0].location, laws[1].location)
    assert_array_equal(laws[0].location != laws[2].location, chosen(4, 2))


@every
@pytest.mark.parametrize("stop", [61, 70, 79, 80, 95, 120])
def test_a_monitor_stored_amid_relearning_continues_bit_for_bit(detector, stop):
    x = losses(5, 200, seed=8)
    x[:, 150:] *= 5.0
    active = dropouts(x)
    redeployed = {60: chosen(5, 0, 2), 75: chosen(5, 2, 3), 130: chosen(5, 1)}
    monitor = Monitor(detector, calibration=50, relearning=20)
    watched(monitor, x[:, :stop], active[:, :stop], redeployed)
    back = Monitor.from_bytes(monitor.to_bytes(), detector)
    assert back.to_bytes() == monitor.to_bytes()
    assert back.relearning == 20
    assert_array_equal(back.watched, monitor.watched)
    later = {tick - stop: mask for tick, mask in redeployed.items() if tick >= stop}
    alarms = watched(monitor, x[:, stop:], active[:, stop:], later)
    assert watched(back, x[:, stop:], active[:, stop:], later) == alarms
    assert back.to_bytes() == monitor.to_bytes()
    assert alarms


def test_one_stream_can_relearn():
    monitor = Monitor(LOSSES, calibration=40, relearning=10)
    values = losses(1, 40, seed=9)[0]
    assert [monitor.update(float(x)) for x in values] == [None] * 40
    monitor.relearn(np.array([True]))
    assert [monitor.update(50.0 * float(x)) for x in values[:10]] == [None] * 10
    assert monitor.update(50.0 * float(np.median(values))) is None
    answers = [monitor.update(5e4) for _ in range(4)]  # a pool of 40 values knows no score above 2.25
    assert answers[:3] == [None] * 3
    assert (answers[3].tick, answers[3].stream, answers[3].changed_at) == (55, 0, 52)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_value_that_cannot_be_learned_from_is_refused_and_changes_nothing(bad):
    monitor = Monitor(LOSSES, calibration=40, relearning=10)
    x = losses(3, 45, seed=10)
    watched(monitor, x[:, :42])
    monitor.relearn(chosen(3, 2))
    watched(monitor, x[:, 42:])
    before = monitor.to_bytes()
    for row in (2,) if bad == np.inf else (2, 0):  # a watched stream takes an infinite loss for the clip
        value = x[:, 0].copy()
        value[row] = bad
        with pytest.raises(ValueError, match=f"stream {row}|row {row}"):
            monitor.update(value)
        assert monitor.to_bytes() == before
    monitor.update(np.where(chosen(3, 2), bad, x[:, 0]), ~chosen(3, 2))


def test_relearning_needs_a_learning_phase_that_has_ended_and_a_mask_of_the_streams():
    for monitor, done in ((Monitor(LOSSES, calibration=5), 0), (Monitor(LOSSES, calibration=5), 2)):
        watched(monitor, losses(3, done))
        with pytest.raises(ValueError, match=f"comes after the first learning phase, of which {done} of 5 updates are done"):
            monitor.relearn(chosen(3, 0))
    plain = Monitor(LOSSES)
    plain.update([0.0, 0.0])
    with pytest.raises(ValueError, match="pass calibration"):
        plain.relearn(chosen(2, 0))
    monitor = Monitor(LOSSES, calibration=10)
    watched(monitor, losses(3, 12))
    before = monitor.to_bytes()
    for mask in (chosen(2, 0), np.array([0, 1, 2]), [True, False], np.ones((3, 1), dtype=bool)):
        with pytest.raises(ValueError, match=r"mask must be booleans of shape \(3,\)"):
            monitor.relearn(mask)
    monitor.relearn(np.zeros(3, dtype=bool))
    assert monitor.to_bytes() == before
    with pytest.raises(ValueError, match="relearning must be at least 2"):
        Monitor(LOSSES, calibration=10, relearning=1)
