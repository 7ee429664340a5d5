from dataclasses import dataclass

import numpy as np
import pytest

from detection import (
    CUSUM,
    FOCuS,
    Gaussian,
    PageHinkley,
    RunLengths,
    ScoreCUSUM,
    SelfStarted,
    SelfStarting,
    Singleton,
    WindowGLR,
    block_bootstrap,
    calibrated,
    calibration,
    exact_run_length,
    likelihood_increment,
    run_length_distribution,
    threshold_for,
)

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
INCREMENT = likelihood_increment(NULL, SHIFTED)


def true_ratio(threshold, arl):
    return exact_run_length(INCREMENT, NULL, threshold) / arl


def simulated_arl(detector, law, streams, ticks, seed):
    """Total ticks over alarms, each stream restarted after its alarm."""
    rng, state, alarms = np.random.default_rng(seed), detector.init(streams), 0
    for _ in range(ticks):
        state = detector.step(state, law.sample(rng, streams))
        fired = detector.alarms(state)
        alarms += int(fired.sum())
        state = detector.restart(state, fired)
    return streams * ticks / alarms


@pytest.mark.parametrize("post", [SHIFTED, Gaussian(0.5, 1.8)])
def test_a_threshold_calibrated_for_a_thousand_ticks_keeps_its_promise_when_simulated_afresh(post):
    detector = ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(post), arl=1000)
    assert simulated_arl(detector, NULL, 2000, 2000, seed=0) == pytest.approx(1000, rel=0.05)


def test_a_threshold_calibrated_for_ten_thousand_ticks_keeps_its_promise_when_simulated_afresh():
    detector = ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=10_000)
    assert simulated_arl(detector, NULL, 10_000, 1000, seed=1) == pytest.approx(10_000, rel=0.1)


@pytest.mark.parametrize(("arl", "plain", "certified"), [(1_000, (0.99, 0.05), (1.04, 0.05)), (10_000, (1.0, 0.16), (1.13, 0.18))])
def test_one_pass_of_censored_paths_finds_the_threshold_even_beyond_its_horizon(arl, plain, certified):
    runs = [RunLengths.of(INCREMENT(np.random.default_rng(seed).standard_normal((2000, 1000)))) for seed in range(3)]
    assert np.mean([true_ratio(r.threshold(arl, certified=False), arl) for r in runs]) == pytest.approx(plain[0], abs=plain[1])
    assert np.mean([true_ratio(r.threshold(arl), arl) for r in runs]) == pytest.approx(certified[0], abs=certified[1])


def test_the_truncated_mean_at_a_horizon_equal_to_the_target_is_low_by_a_third():
    threshold = CUSUM.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=1000, clip=None).threshold
    runs = RunLengths.of(INCREMENT(np.random.default_rng(0).standard_normal((2000, 1000))))
    ticks, _ = runs.counts(threshold)
    truncated = ticks / 2000
    assert truncated == pytest.approx(1000 * (1 - 0.37), rel=0.04)
    assert runs.average(threshold) == pytest.approx(1000, rel=0.08)


def test_run_lengths_count_the_first_crossing_and_censor_the_rest():
    runs = RunLengths.of(np.array([[1.0, 1.0, -5.0, 0.0], [0.0, 0.0, 0.0, 0.5]]))
    assert runs.counts(2.0) == (2 + 4, 1)
    assert runs.counts(0.5) == (1 + 4, 2)
    assert runs.average(2.0) == 6.0
    assert np.isnan(runs.average(3.0))
    assert runs.certified(3.0) == pytest.approx(8 / -np.log(0.05))


@pytest.mark.parametrize(("paths", "horizon"), [(20_000, 60), (10_000, 200)])
def test_runs_that_hardly_outlast_the_rise_of_the_statistic_still_keep_the_promise(paths, horizon):
    found = [
        calibrated(ANY[3], NULL, arl=5_000, rng=np.random.default_rng(seed), paths=paths, horizon=horizon, certified=False).threshold
        for seed in range(4)
    ]
    assert np.mean([true_ratio(b, 5_000) for b in found]) == pytest.approx(1.0, abs=0.1)


def test_both_ways_to_run_lengths_keep_the_rise_and_agree():
    x = np.random.default_rng(0).standard_normal((300, 60))
    added, stepped = RunLengths.of(INCREMENT(x), rise=20), RunLengths.of_detector(ANY[3], x, rise=20)
    assert added.rise == stepped.rise == 20
    assert added.interval(3.0) == stepped.interval(3.0)


@pytest.mark.parametrize("certified", [True, False])
def test_a_highest_peak_within_the_rise_is_no_reason_to_refuse(certified):
    x = np.random.default_rng(0).standard_normal((400, 60))
    x[0, :3] = 9.0
    runs = RunLengths.of(INCREMENT(x), rise=20)
    assert runs.maxima[0, 19] == runs.maxima.max()
    assert runs.threshold(500, certified=certified) < runs.maxima.max()


def test_the_rise_counts_for_itself_and_the_tail_for_those_quiet_up_to_it():
    runs = RunLengths(np.array([[0.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]]), rise=2)
    assert runs.counts(3.0) == (2 + 2, 1)
    assert runs.average(3.0) == pytest.approx(2 + 2 / 3 * 4)
    assert runs.interval(3.0)[0] < runs.average(3.0) < runs.interval(3.0)[1]


def test_simulated_thresholds_agree_with_exact_ones_and_cover_every_law():
    laws = [NULL, Gaussian(0.2, 1.0)]
    simulated = threshold_for(INCREMENT, laws, 500, method="simulate", rng=np.random.default_rng(0), certified=False)
    assert simulated == pytest.approx(threshold_for(INCREMENT, laws[1:], 500), rel=0.02)


def test_vector_streams_are_calibrated_by_simulation():
    pre, post = Gaussian((0.0, 0.0), 1.0), Gaussian((1.0, 0.0), (1.0, 1.5))
    detector = ScoreCUSUM.fit(pre=Singleton(pre), post=Singleton(post), arl=300, clip=None, method="simulate", rng=np.random.default_rng(0))
    assert simulated_arl(detector, pre, 1000, 2000, seed=5) == pytest.approx(315, rel=0.08)


def test_resampled_blocks_keep_the_dependence_that_fools_the_exact_chain():
    rng, phi = np.random.default_rng(0), 0.3
    x = rng.standard_normal((200, 1100))
    for t in range(1, x.shape[1]):
        x[:, t] = phi * x[:, t - 1] + np.sqrt(1 - phi**2) * x[:, t]
    x = x[:, 100:]
    bootstrap = threshold_for(INCREMENT, [], 500, method="bootstrap", streams=x, rng=rng, certified=False)
    exact = threshold_for(INCREMENT, [NULL], 500)
    runs = RunLengths.of(INCREMENT(x))
    assert runs.average(exact) < 250
    assert runs.average(bootstrap) > 350


def test_resampled_blocks_are_pieces_of_one_stream():
    streams = np.arange(20).reshape(2, 10)
    paths = block_bootstrap(streams, 50, 40, np.random.default_rng(0)).astype(int)
    follows = (paths[:, 1:] // 10 == paths[:, :-1] // 10) & (paths[:, 1:] % 10 == (paths[:, :-1] + 1) % 10)
    assert follows.mean() == pytest.approx(1 - 10 ** (-1 / 3) * 0.95, abs=0.03)
    assert block_bootstrap(np.zeros((2, 10, 3)), 5, 7, np.random.default_rng(0)).shape == (5, 7, 3)


def test_the_floor_is_the_logarithm_and_looser_than_the_exact_threshold():
    floor = threshold_for(INCREMENT, [NULL], 1000, method="floor")
    assert floor == pytest.approx(np.log(1000))
    assert true_ratio(floor, 1000) == pytest.approx(6.35, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "method must be one of"),
        ({"method": "simulate"}, "pass rng"),
        ({"method": "bootstrap", "rng": np.random.default_rng(0)}, "pass streams"),
        ({"method": "simulate", "rng": np.random.default_rng(0), "paths": 10, "horizon": 10}, "longer watching than 100 ticks"),
    ],
)
def test_calibration_without_what_it_needs_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        threshold_for(INCREMENT, [NULL], 1000, **options)


def test_a_promise_below_two_ticks_is_refused_by_every_method():
    for method in ("exact", "simulate", "bootstrap", "floor"):
        with pytest.raises(ValueError, match="arl must be at least 2"):
            threshold_for(INCREMENT, [NULL], 1.9, method=method)


ANY = [
    FOCuS(threshold=1.0),
    WindowGLR(threshold=1.0, window=30),
    PageHinkley(threshold=1.0, delta=0.1, alpha=1.0, min_instances=1, side="up"),
    CUSUM(pre=NULL, post=SHIFTED, threshold=1.0),
]


@pytest.mark.parametrize("detector", ANY, ids=lambda d: type(d).__name__)
@pytest.mark.slow
def test_any_detector_keeps_the_run_length_it_was_calibrated_to(detector):
    tuned = calibrated(detector, NULL, arl=200, rng=np.random.default_rng(0), certified=False)
    assert type(tuned) is type(detector)
    assert simulated_first_alarms(tuned, 2000, 1500, seed=1) == pytest.approx(200, rel=0.08)


def simulated_first_alarms(detector, streams, ticks, seed):
    """Ticks to the first alarm over the runs that alarmed, the others censored."""
    rng, state, going, watched, alarms = np.random.default_rng(seed), detector.init(streams), np.ones(streams, bool), 0, 0
    for _ in range(ticks):
        state = detector.step(state, rng.standard_normal(streams), going)
        watched += int(going.sum())
        fired = detector.alarms(state) & going
        alarms += int(fired.sum())
        going &= ~fired
    return watched / alarms


@pytest.mark.parametrize("arl", [100, 1_000, 10_000])
@pytest.mark.slow
def test_simulated_thresholds_keep_their_run_length_within_five_percent(arl):
    """Spread of 400 alarms or more a calibration; averaged over calibrations, so the error left is about 2 %."""
    found = [
        calibrated(ANY[3], NULL, arl=arl, rng=np.random.default_rng(seed), certified=False, horizon=max(400, arl)).threshold
        for seed in range(4)
    ]
    assert np.mean([true_ratio(b, arl) for b in found]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
def test_a_certified_calibration_is_rarely_below_its_target():
    found = [calibration(ANY[3], NULL, arl=100, rng=np.random.default_rng(seed), paths=200, horizon=400) for seed in range(40)]
    below = sum(true_ratio(c.threshold, 100) < 1 for c in found)
    assert below <= 6, "5 % of 40, and a little"
    assert all(c.interval[0] <= c.arl <= c.interval[1] for c in found)
    covered = sum(c.interval[0] <= exact_run_length(INCREMENT, NULL, c.threshold) <= c.interval[1] for c in found)
    assert covered >= 33


def test_a_probability_over_a_horizon_agrees_with_the_exact_chain():
    found = calibrated(ANY[3], NULL, false_alarm=(0.1, 300), rng=np.random.default_rng(0), paths=8000, certified=False)
    assert run_length_distribution(INCREMENT, NULL, found.threshold, 300)[-1] == pytest.approx(0.1, abs=0.012)
    safe = calibrated(ANY[3], NULL, false_alarm=(0.1, 300), rng=np.random.default_rng(0), paths=2000)
    assert run_length_distribution(INCREMENT, NULL, safe.threshold, 300)[-1] < 0.1


def test_resampled_blocks_keep_the_dependence_that_single_ticks_lose():
    rng, phi = np.random.default_rng(0), 0.5
    streams = rng.standard_normal((50, 2_000))
    for t in range(1, 2_000):
        streams[:, t] = phi * streams[:, t - 1] + np.sqrt(1 - phi**2) * streams[:, t]
    in_blocks, alone = (
        calibrated(ANY[3], streams, arl=200, rng=np.random.default_rng(1), block=b, certified=False).threshold for b in (40, 1)
    )
    assert in_blocks > alone + 1.0


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ({}, "exactly|one target"),
        ({"arl": 100, "false_alarm": (0.1, 10)}, "one target"),
        ({"arl": 1}, "at least 2"),
        ({"false_alarm": (1.5, 10)}, "probability in"),
        ({"false_alarm": (0.1, 10), "horizon": 20}, "horizon is that of false_alarm"),
        ({"false_alarm": (0.0001, 10)}, "needs more than 2000 runs"),
        ({"arl": 1e7, "horizon": 100}, "needs longer watching"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(target, told):
    with pytest.raises(ValueError, match=told):
        calibrated(ANY[3], NULL, rng=np.random.default_rng(0), **target)


@dataclass(frozen=True, kw_only=True)
class Odd(CUSUM):
    """A CUSUM that has no statistic, ``before``, in its first 50 ticks, and one out of this world where it exceeds ``top``."""

    before: float = -np.inf
    top: float = np.inf

    def statistic(self, state):
        statistic = np.where(state.clock <= 50, self.before, state.statistic)
        return np.where(statistic > self.top, np.inf, statistic)


def test_a_detector_that_warms_up_is_calibrated_with_its_silence_counted():
    tuned = calibrated(Odd(pre=NULL, post=SHIFTED, threshold=1.0), NULL, arl=200, rng=np.random.default_rng(0), certified=False)
    assert simulated_first_alarms(tuned, 2000, 1500, seed=1) == pytest.approx(200, rel=0.08)
    assert tuned.threshold < calibrated(ANY[3], NULL, arl=200, rng=np.random.default_rng(0), certified=False).threshold


def test_a_statistic_that_leaps_to_infinity_alarms_at_any_threshold_and_is_calibrated_below():
    usual = calibrated(ANY[3], NULL, arl=200, rng=np.random.default_rng(0)).threshold
    leaping = Odd(pre=NULL, post=SHIFTED, threshold=1.0, top=usual + 0.5)
    assert calibrated(leaping, NULL, arl=200, rng=np.random.default_rng(0)).threshold < usual + 0.5
    with pytest.raises(ValueError, match="needs longer watching"):
        calibrated(leaping, NULL, arl=5000, rng=np.random.default_rng(0))


def test_statistics_that_are_no_numbers_or_never_rise_are_refused():
    with pytest.raises(ValueError, match="is nan in 100 of 100 runs"):
        calibrated(Odd(pre=NULL, post=SHIFTED, threshold=1.0, before=np.nan), NULL, arl=20, rng=np.random.default_rng(0), paths=100)
    with pytest.raises(ValueError, match="rises above 0, got at most -inf"):
        calibrated(Odd(pre=NULL, post=SHIFTED, threshold=1.0), NULL, arl=20, rng=np.random.default_rng(0), paths=100, horizon=50)


def test_a_target_below_the_shortest_run_length_gives_the_least_threshold_and_ends():
    sure = CUSUM(pre=NULL, post=Gaussian(3.0, 1.0), threshold=3.0)
    found = calibration(sure, NULL, arl=10, rng=np.random.default_rng(0), paths=200, horizon=200)
    assert 0 < found.threshold < 1e-6
    assert found.arl > 10


def test_a_detector_that_learns_until_it_alarms_is_calibrated_the_same_from_any_threshold():
    """Its statistic depends on its threshold after an alarm, never before."""
    found = [
        calibrated(
            SelfStarted(threshold=b, detector=ANY[3], scores=SelfStarting(warm=30)), NULL, arl=200, rng=np.random.default_rng(1), paths=400
        ).threshold
        for b in (0.5, 4.0, 100.0)
    ]
    assert found[0] == found[1] == found[2]
