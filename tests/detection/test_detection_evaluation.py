import numpy as np
import pytest

from detection import Delay, average_run_length, detection_delay


def test_censored_runs_add_their_ticks_but_not_an_alarm():
    assert average_run_length([10, 20, 100], [False, False, True]) == 65.0
    assert average_run_length([10, 20]) == 15.0
    assert np.isnan(average_run_length([100, 100], [True, True]))


def test_censoring_recovers_the_mean_of_exponential_run_lengths():
    ticks = np.random.default_rng(0).exponential(1000, 40_000)
    assert average_run_length(np.minimum(ticks, 500), ticks > 500) == pytest.approx(1000, rel=0.03)


def test_delays_count_observations_used_and_false_alarms_apart():
    result = detection_delay([100, 104, 99, np.nan, 50], [100, 100, 100, 100, np.nan])
    assert result == Delay(mean=3.0, detected=2, missed=1, false_alarms=2)


def test_an_alarm_on_the_first_changed_value_has_delay_one_and_is_zero_elapsed_ticks():
    alarm, nu = 100, 100
    assert detection_delay([alarm], nu).mean == 1
    assert detection_delay([alarm], nu).mean - 1 == alarm - nu


def test_nothing_detected_has_no_mean_delay():
    result = detection_delay([np.nan, 3.0], 10)
    assert np.isnan(result.mean)
    assert (result.detected, result.missed, result.false_alarms) == (0, 1, 1)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="shape of ticks"):
        average_run_length([1, 2], [True])
