import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal

drift = pytest.importorskip("river.drift")
binary = pytest.importorskip("river.drift.binary")

from detection import CUSUM, Gaussian, NormalScores  # noqa: E402 - after the skips
from detection.river_detectors import RiverDetector, river_first_alarms  # noqa: E402
from detection.river_drift import ScoreDriftDetector  # noqa: E402

STREAMS, TICKS = 2, 400
PROTOTYPES = {
    "ADWIN": lambda: drift.ADWIN(),
    "KSWIN": lambda: drift.KSWIN(alpha=0.001, window_size=40, stat_size=15, seed=7),
    "PageHinkley": lambda: drift.PageHinkley(threshold=10.0),
    "DDM": lambda: binary.DDM(),
    "HDDM_A": lambda: binary.HDDMA(),
    "HDDM_W": lambda: binary.HDDMW(),
}


def streams_for(prototype, seed=0):
    """Numbers (STREAMS, TICKS) that rise at half time, or misses that become more frequent."""
    rng, changed = np.random.default_rng(seed), np.arange(TICKS) >= TICKS // 2
    if hasattr(binary, type(prototype).__name__):
        return (rng.random((STREAMS, TICKS)) < np.where(changed, 0.6, 0.1)).astype(float)
    return rng.standard_normal((STREAMS, TICKS)) + 2.0 * changed


def by_hand(prototype, stream, anew):
    """Verdicts (T,) of river's own loop, with a new copy after each drift or the same object throughout."""
    detector, verdicts = pickle.loads(pickle.dumps(prototype)), []
    for value in stream.tolist():
        detector.update(value)
        verdicts.append(1.0 if detector.drift_detected else 0.5 * getattr(detector, "warning_detected", False))
        if anew and detector.drift_detected:
            detector = pickle.loads(pickle.dumps(prototype))
    return np.array(verdicts)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("name", PROTOTYPES)
def test_drifts_and_warnings_fall_on_the_ticks_of_rivers_own_loop(name, restarted):
    prototype = PROTOTYPES[name]()
    x, detector = streams_for(prototype), RiverDetector(prototype=prototype)
    state, verdicts = detector.init(STREAMS), np.empty((STREAMS, TICKS))
    for tick, column in enumerate(x.T):
        state = detector.step(state, column)
        verdicts[:, tick] = detector.statistic(state)
        alarmed = detector.alarms(state)
        assert_array_equal(alarmed, verdicts[:, tick] == 1.0)
        assert ((detector.changed_at(state) >= 1) & (detector.changed_at(state) <= state.clock + 1)).all()
        state = detector.restart(state, alarmed) if restarted else state
    expected = np.array([by_hand(prototype, stream, restarted) for stream in x])
    assert_array_equal(verdicts, expected)
    assert (expected[:, TICKS // 2 :] == 1.0).any(axis=1).all()
    first = np.array([np.argmax(row == 1.0) + 1.0 for row in expected])
    assert_array_equal(river_first_alarms(prototype, x.T), first)


def test_adwin_places_the_change_at_the_start_of_its_shortened_window():
    detector, rng = RiverDetector(prototype=drift.ADWIN()), np.random.default_rng(1)
    state, tick = detector.init(1), 0
    while not detector.alarms(state).any():
        tick += 1
        state = detector.step(state, [0.1 * rng.standard_normal() + (tick > 200)])
    assert detector.changed_at(state)[0] == tick - int(state.detectors[0].width) + 1
    assert abs(detector.changed_at(state)[0] - 201) <= 32


def test_adwin_needs_fifty_ticks_for_a_shift_of_one_deviation_and_hardly_ever_alarms_before():
    x = np.random.default_rng(4).standard_normal((1200, 100))
    x[1000:] += 1.0
    first = river_first_alarms(drift.ADWIN(), x)
    assert (first <= 1000).sum() <= 2
    assert (first[first > 1000] - 1000).mean() == pytest.approx(52.0, abs=4.0)


def test_a_warning_that_turns_into_drift_places_the_change_at_its_first_tick():
    prototype = binary.DDM()
    detector, x = RiverDetector(prototype=prototype), streams_for(prototype)[:1]
    state, warned_since = detector.init(1), None
    for tick, value in enumerate(x[0], start=1):
        state = detector.step(state, [value])
        verdict = detector.statistic(state)[0]
        warned_since = None if verdict == 0.0 else warned_since or tick
        if verdict == 1.0:
            break
    assert verdict == 1.0
    assert detector.changed_at(state)[0] == warned_since


def test_streams_are_independent_and_states_are_values():
    prototype = PROTOTYPES["ADWIN"]()
    detector, x = RiverDetector(prototype=prototype), streams_for(prototype)
    state = detector.init(STREAMS)
    for column in x[:, :230].T:
        state = detector.step(state, column)
    before = pickle.dumps(state)
    first = detector.step(state, x[:, 230])
    assert pickle.dumps(state) == before
    assert pickle.dumps(detector.step(state, x[:, 230])) == pickle.dumps(first)
    idle = detector.step(state, [np.nan, 0.0], np.array([False, True]))
    assert idle.detectors[0] is state.detectors[0]
    assert_array_equal(idle.clock, [230, 231])


def test_hits_and_misses_must_be_zero_or_one():
    detector = RiverDetector(prototype=binary.DDM())
    with pytest.raises(ValueError, match="DDM takes 0 and 1 only, got 1 other values, the first in stream 1"):
        detector.step(detector.init(3), [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="0 and 1 only"):
        river_first_alarms(binary.DDM(), [[0.0], [2.0]])


def test_no_alarm_is_nan_and_nothing_else_is_accepted():
    assert np.isnan(river_first_alarms(drift.ADWIN(), np.zeros((50, 2)))).all()
    with pytest.raises(ValueError, match="finite"):
        river_first_alarms(drift.ADWIN(), [[np.nan]])
    with pytest.raises(ValueError, match="prototype"):
        RiverDetector(prototype=drift.ADWIN)
    with pytest.raises(ValueError, match="threshold"):
        RiverDetector(prototype=drift.ADWIN(), threshold=0.7)
    with pytest.raises(ValueError, match="first is stream 1"):
        RiverDetector(prototype=drift.ADWIN()).step(RiverDetector(prototype=drift.ADWIN()).init(2), [0.0, np.nan])


CUSUM_UP = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.0, 1.0), threshold=8.0)


def test_our_detector_runs_in_rivers_loop_and_finds_each_change():
    rng = np.random.default_rng(2)
    levels = np.repeat([0.0, 3.0, 6.0], 150)
    found, ours = [], ScoreDriftDetector(CUSUM_UP, calibration=60, transform=NormalScores(scale="identity", robust=True))
    for index, value in enumerate((levels + rng.standard_normal(450)).tolist()):
        ours.update(value)
        if ours.drift_detected:
            found.append((index, ours.changed_at))
        else:
            assert ours.changed_at is None
    assert len(found) == 2
    for (index, changed), true in zip(found, (150, 300), strict=True):
        assert true <= index < true + 20
        assert abs(changed - true) <= 5


def test_a_standardised_stream_gives_the_detectors_own_alarms():
    x = np.random.default_rng(3).standard_normal(600) + 0.8 * (np.arange(600) > 300)
    ours, state, alarms = ScoreDriftDetector(CUSUM_UP), CUSUM_UP.init(1), 0
    for value in x:
        ours.update(value)
        state = CUSUM_UP.step(state, [value])
        alarmed = CUSUM_UP.alarms(state)
        assert ours.drift_detected == alarmed[0]
        state, alarms = CUSUM_UP.restart(state, alarmed), alarms + int(alarmed[0])
    assert alarms > 3


def test_rivers_clone_is_a_fresh_detector_of_the_same_settings():
    ours = ScoreDriftDetector(CUSUM_UP)
    for _ in range(20):
        ours.update(2.0)
        if ours.drift_detected:
            break
    clone = ours.clone()
    assert ours.drift_detected
    assert not clone.drift_detected
    assert clone.detector == CUSUM_UP
    assert clone.calibration == 0
