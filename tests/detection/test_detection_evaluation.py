import numpy as np
import pytest

from detection import (
    CUSUM,
    Delay,
    FOCuS,
    Gaussian,
    average_run_length,
    detection_delay,
    exact_run_length,
    exact_threshold,
    late_delay,
    likelihood_increment,
    run_length_distribution,
)
from detection.evaluation import evaluate, location_errors, operating_curve

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
INCREMENT = likelihood_increment(NULL, SHIFTED)
PAGE = CUSUM(pre=NULL, post=SHIFTED, threshold=4.0)


def within(measured, truth):
    """Whether a doubled 95 % interval holds the truth: it fails once in 10,000."""
    half = 0.5 * (measured.interval[1] - measured.interval[0])
    return measured.interval[0] - half <= truth <= measured.interval[1] + half


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


def test_an_evaluation_agrees_with_the_exact_chain_in_everything_it_measures():
    found = evaluate(PAGE, NULL, SHIFTED, nu=120, rng=np.random.default_rng(0), runs=8000, horizon=400)
    assert found.threshold == 4.0
    assert within(found.arl, exact_run_length(INCREMENT, NULL, 4.0))
    assert within(found.false_alarm, run_length_distribution(INCREMENT, NULL, 4.0, 400)[-1])
    assert within(found.worst_delay, exact_run_length(INCREMENT, SHIFTED, 4.0))
    assert within(found.delay, late_delay(INCREMENT, NULL, SHIFTED, 4.0))
    assert found.counts.false_alarms / 8000 == pytest.approx(run_length_distribution(INCREMENT, NULL, 4.0, 119)[-1], abs=0.02)
    assert found.counts.missed == 0 == found.miss.value
    assert found.delay.value == found.counts.mean


def test_misses_within_the_horizon_are_counted_and_shared():
    found = evaluate(PAGE, NULL, SHIFTED, nu=1, rng=np.random.default_rng(1), runs=8000, horizon=8)
    assert within(found.miss, 1 - run_length_distribution(INCREMENT, SHIFTED, 4.0, 8)[-1])
    assert found.counts.missed + found.counts.detected == 8000
    assert found.counts.false_alarms == 0, "no tick comes before the first"
    assert found.delay.value < exact_run_length(INCREMENT, SHIFTED, 4.0) - 1, "the mean of the runs caught leaves out the slow ones"


def test_a_detector_that_never_alarms_has_no_delay_and_an_unbounded_run_length():
    found = evaluate(CUSUM(pre=NULL, post=SHIFTED, threshold=1e6), NULL, SHIFTED, nu=5, rng=np.random.default_rng(0), runs=50, horizon=20)
    assert found.arl.value == np.inf
    assert 50 * 20 / 4 < found.arl.interval[0] < found.arl.interval[1] == np.inf
    assert np.isnan(found.delay.value)
    assert np.isnan(found.worst_delay.value)
    assert found.miss.value == 1.0
    assert found.false_alarm.interval == pytest.approx((0.0, 1 - 0.025 ** (1 / 50)))


def test_intervals_cover_the_truth_as_often_as_they_say():
    covered = np.zeros(3)
    for seed in range(60):
        found = evaluate(PAGE, NULL, SHIFTED, nu=30, rng=np.random.default_rng(seed), runs=200, horizon=400)
        truths = (exact_run_length(INCREMENT, NULL, 4.0), exact_run_length(INCREMENT, SHIFTED, 4.0))
        for k, (measured, truth) in enumerate(zip((found.arl, found.worst_delay), truths, strict=True)):
            covered[k] += measured.interval[0] <= truth <= measured.interval[1]
        chance = run_length_distribution(INCREMENT, NULL, 4.0, 400)[-1]
        covered[2] += found.false_alarm.interval[0] <= chance <= found.false_alarm.interval[1]
    assert (covered >= 52).all(), covered


def test_one_simulation_serves_every_threshold_of_an_operating_curve():
    thresholds = [3.0, 4.0, 5.0]
    curve = operating_curve(PAGE, NULL, SHIFTED, thresholds=thresholds, rng=np.random.default_rng(2), nu=100, runs=4000, horizon=600)
    assert [point.threshold for point in curve] == thresholds
    assert all(within(p.arl, exact_run_length(INCREMENT, NULL, p.threshold)) for p in curve)
    assert all(within(p.delay, late_delay(INCREMENT, NULL, SHIFTED, p.threshold)) for p in curve)
    alone = evaluate(
        CUSUM(pre=NULL, post=SHIFTED, threshold=5.0), NULL, SHIFTED, rng=np.random.default_rng(2), nu=100, runs=4000, horizon=600
    )
    assert alone == curve[-1], "the highest threshold decides how long the runs are watched, and so the numbers drawn"


def test_an_operating_curve_finds_the_thresholds_of_the_run_lengths_asked_for():
    arls = [50.0, 200.0, 1000.0]
    curve = operating_curve(PAGE, NULL, SHIFTED, arls=arls, rng=np.random.default_rng(3), runs=2000, horizon=1000)
    assert [p.arl.value for p in curve] == pytest.approx(arls, rel=0.01)
    assert [exact_run_length(INCREMENT, NULL, p.threshold) for p in curve] == pytest.approx(arls, rel=0.1)
    assert curve[0].delay.value < curve[1].delay.value < curve[2].delay.value


def test_any_detector_and_vector_or_resampled_streams_can_be_evaluated():
    streams = np.random.default_rng(4).standard_normal((50, 500))
    found = evaluate(FOCuS(threshold=5.0), streams, streams + 1.0, nu=50, rng=np.random.default_rng(5), runs=300, horizon=200)
    drawn = evaluate(FOCuS(threshold=5.0), NULL, SHIFTED, nu=50, rng=np.random.default_rng(6), runs=300, horizon=200)
    assert found.delay.value == pytest.approx(drawn.delay.value, rel=0.15)
    pre, post = Gaussian((0.0, 0.0), 1.0), Gaussian((0.6, 0.8), 1.0)
    plane = evaluate(CUSUM(pre=pre, post=post, threshold=4.0), pre, post, rng=np.random.default_rng(7), runs=2000, horizon=100)
    assert within(plane.worst_delay, exact_run_length(INCREMENT, SHIFTED, 4.0))


def test_the_estimated_change_is_off_by_the_known_quantiles():
    """Shift 1 at a run length of 1,000: half of the estimates lie within two ticks or so of the change."""
    detector = CUSUM(pre=NULL, post=SHIFTED, threshold=exact_threshold(INCREMENT, [NULL], 1000))
    errors = location_errors(detector, NULL, SHIFTED, nu=100, rng=np.random.default_rng(0), runs=20_000, horizon=500)
    assert np.quantile(errors, [0.05, 0.25, 0.5, 0.75, 0.95]) == pytest.approx([-7, -1, 0, 2, 8], abs=1)
    assert (np.abs(errors) <= 3).mean() == pytest.approx(0.73, abs=0.03)
    assert len(errors) == pytest.approx(20_000 * (1 - run_length_distribution(INCREMENT, NULL, detector.threshold, 99)[-1]), rel=0.02)
    found = evaluate(detector, NULL, SHIFTED, nu=100, rng=np.random.default_rng(1), runs=5000, horizon=200)
    assert found.delay.value == pytest.approx(9.8, abs=0.3)


@pytest.mark.parametrize(
    ("options", "told"),
    [({}, "give one of"), ({"arls": [10], "thresholds": [1]}, "give one of"), ({"arls": [1e6], "horizon": 10}, "longer watching")],
)
def test_an_operating_curve_without_its_points_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        operating_curve(PAGE, NULL, SHIFTED, rng=np.random.default_rng(0), runs=10, **options)


@pytest.mark.parametrize("name", ["nu", "runs", "horizon"])
def test_sizes_below_one_are_refused(name):
    for score in (evaluate, location_errors):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            score(PAGE, NULL, SHIFTED, rng=np.random.default_rng(0), **{name: 0})
