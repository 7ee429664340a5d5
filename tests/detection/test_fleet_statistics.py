from itertools import combinations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import CUSUM, Gaussian, RunLengths
from detection.fleet import (
    FleetDetector,
    MaxOfStatistics,
    MixtureOfStatistics,
    SoftThresholdSum,
    SumOfStatistics,
    TopR,
    calibrate_fleet,
)
from detection.run_length import exact_run_length, exact_threshold

NULL = Gaussian(0.0, 1.0)
LOCAL = CUSUM(pre=NULL, post=Gaussian(1.0, 1.0), threshold=5.0)
STATISTICS = [SumOfStatistics(), MaxOfStatistics(), TopR(r=3), SoftThresholdSum(c=1.0), MixtureOfStatistics(p0=0.05)]
every_statistic = pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)


def local_statistics(shape, seed=0):
    return np.maximum(np.random.default_rng(seed).normal(0.0, 3.0, shape), 0.0)


def by_hand(statistic, z):
    """The definition, one number at a time."""
    match statistic:
        case SumOfStatistics():
            return sum(z)
        case MaxOfStatistics():
            return max(z)
        case TopR():
            return max(sum(some) for some in combinations(z, min(statistic.r, len(z))))
        case SoftThresholdSum():
            return sum(value - statistic.c for value in z if value > statistic.c)
        case MixtureOfStatistics():
            return np.log(np.prod([1 - statistic.p0 + statistic.p0 * np.exp(value) for value in z]))


@every_statistic
def test_a_fleet_statistic_is_its_definition(statistic):
    z = local_statistics((4, 9))
    assert_allclose(statistic(z), [by_hand(statistic, row.tolist()) for row in z], rtol=1e-12)
    assert_allclose(statistic(z[:, ::-1]), statistic(z), rtol=1e-12)


def test_special_cases_of_the_statistics_agree():
    z = local_statistics((5, 7))
    assert_array_equal(TopR(r=1)(z), MaxOfStatistics()(z))
    for everything in (TopR(r=7), TopR(r=20), SoftThresholdSum(c=0.0), MixtureOfStatistics(p0=1.0)):
        assert_allclose(everything(z), SumOfStatistics()(z), rtol=1e-12)
    assert_allclose(MixtureOfStatistics(p0=0.5)(np.full((1, 3), 2000.0)), 3 * (2000.0 - np.log(2.0)))


@every_statistic
def test_with_absent_clients_the_statistic_is_that_of_what_each_client_has_shown(statistic):
    rng = np.random.default_rng(1)
    x, active = rng.normal(0.3, 1.0, (50, 6)), rng.random((50, 6)) < 0.5
    fleet = FleetDetector(local=LOCAL, statistic=statistic, groups=np.zeros(6, int), thresholds=np.array([9.0]))
    state = fleet.init()
    for row, there in zip(x, active, strict=True):
        state = fleet.step(state, np.where(there, row, np.nan), there)
    alone = []
    for client in range(6):
        own = LOCAL.init(1)
        for value in x[active[:, client], client]:
            own = LOCAL.step(own, [value])
        alone.append(LOCAL.statistic(own)[0])
    assert_array_equal(fleet.statistics(state), [statistic(np.array(alone))])


@every_statistic
def test_groups_are_fleets_of_their_own(statistic):
    groups = np.array([2, 0, 1, 0, 2, 2, 0])
    fleet = FleetDetector(local=LOCAL, statistic=statistic, groups=groups, thresholds=np.array([4.0, 4.0, 1e6]))
    state = fleet.init()
    for row in np.random.default_rng(2).normal(np.where(groups == 1, 0.0, 1.5), 1.0, (20, 7)):
        state = fleet.step(state, row)
    z = LOCAL.statistic(state)
    assert_array_equal(fleet.statistics(state), [statistic(z[groups == g]) for g in range(3)])
    assert_array_equal(fleet.alarms(state), fleet.statistics(state) >= [4.0, 4.0, 1e6])
    again = LOCAL.statistic(fleet.restart(state, np.array([True, False, False])))
    assert_array_equal(again, np.where(groups == 0, 0.0, z))


@every_statistic
def test_a_calibrated_fleet_keeps_its_run_length_when_simulated_afresh(statistic):
    arl, streams = 200, 20
    threshold = calibrate_fleet(LOCAL, statistic, streams, NULL, arl=arl, rng=np.random.default_rng(3), paths=400, horizon=400)
    maxima = np.empty((400, 800))
    state, rng = LOCAL.init(400 * streams), np.random.default_rng(4)
    for tick in range(800):
        state = LOCAL.step(state, rng.standard_normal(400 * streams))
        maxima[:, tick] = statistic(LOCAL.statistic(state).reshape(400, streams))
    fresh = RunLengths(np.maximum.accumulate(maxima, axis=1)).average(threshold)
    assert 0.9 * arl < fresh < 1.35 * arl  # certified: 5 % above the target on average, standard errors 4 % each


def test_the_maximum_of_independent_streams_has_the_exact_chains_run_length():
    streams, arl = 10, 100
    threshold = calibrate_fleet(
        LOCAL, MaxOfStatistics(), streams, NULL, arl=arl, rng=np.random.default_rng(5), paths=1000, horizon=400, certified=False
    )
    # first alarms of ten streams: nearly exponential run lengths, so the least of them has a tenth of the mean, plus the start
    assert exact_run_length(LOCAL.increment, NULL, threshold) / (streams * arl) == pytest.approx(1.0, abs=0.12)


def test_halved_availability_doubles_the_run_length_of_one_stream():
    exact = exact_threshold(LOCAL.increment, (NULL,), 100)
    found = calibrate_fleet(
        LOCAL, SumOfStatistics(), 1, NULL, arl=200, rng=np.random.default_rng(6), availability=0.5, paths=2000, horizon=500, certified=False
    )
    assert exact_run_length(LOCAL.increment, NULL, found) == pytest.approx(exact_run_length(LOCAL.increment, NULL, exact), rel=0.1)


def test_streams_in_control_calibrate_like_their_law_and_dependent_ones_ask_for_more():
    rng, settings = np.random.default_rng(8), {"arl": 100, "paths": 400, "horizon": 300, "certified": False}
    noise = rng.standard_normal((50, 400))
    dependent = noise.copy()
    for tick in range(1, 400):
        dependent[:, tick] = 0.5 * dependent[:, tick - 1] + np.sqrt(0.75) * noise[:, tick]
    law, plain, correlated = (
        calibrate_fleet(LOCAL, SumOfStatistics(), 10, source, rng=np.random.default_rng(9), **settings)
        for source in (NULL, noise, dependent)
    )
    assert plain == pytest.approx(law, rel=0.06)
    assert correlated > 1.5 * law


def test_availability_may_differ_between_streams_and_groups():
    present = np.repeat([1.0, 0.3], 20)
    settings = {"arl": 100, "paths": 400, "horizon": 300}
    both = calibrate_fleet(LOCAL, SumOfStatistics(), 40, NULL, rng=np.random.default_rng(10), availability=present, **settings)
    always, rarely = (
        calibrate_fleet(LOCAL, SumOfStatistics(), 40, NULL, rng=np.random.default_rng(10), availability=share, **settings)
        for share in (1.0, 0.3)
    )
    assert rarely < both < always  # slower statistics repeat themselves, so fewer of them pass a threshold
    fleet = FleetDetector.fit(
        local=LOCAL,
        statistic=SumOfStatistics(),
        groups=np.repeat([0, 1, 2], [20, 20, 20]),
        source=NULL,
        rng=np.random.default_rng(11),
        availability=np.concatenate([present, np.ones(20)]),
        **settings,
    )
    assert fleet.thresholds[0] == fleet.thresholds[2] != fleet.thresholds[1]


def test_fit_calibrates_each_size_of_group_once_and_weak_common_shifts_are_seen_in_the_sum():
    groups = np.repeat([0, 1], 50)
    delays = {}
    for statistic in (SumOfStatistics(), MaxOfStatistics()):
        fleet = FleetDetector.fit(
            local=LOCAL, statistic=statistic, groups=groups, source=NULL, arl=200, rng=np.random.default_rng(7), paths=200, horizon=300
        )
        assert fleet.thresholds[0] == fleet.thresholds[1]
        waits = []
        for seed in range(20):
            rng, state, tick = np.random.default_rng(seed), fleet.init(), 0
            while not fleet.alarms(state)[1]:
                state, tick = fleet.step(state, rng.normal(np.where(groups == 1, 0.4, 0.0), 1.0)), tick + 1
            waits.append(tick)
        delays[type(statistic)] = np.mean(waits)
    assert delays[SumOfStatistics] < 0.7 * delays[MaxOfStatistics]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopR(r=0), "r must be"),
        (lambda: SoftThresholdSum(c=-1.0), "c must be"),
        (lambda: MixtureOfStatistics(p0=0.0), "p0 must"),
        (lambda: FleetDetector(local=LOCAL, statistic=TopR(r=1), groups=np.array([0, 2]), thresholds=np.ones(3)), "without a gap"),
        (lambda: FleetDetector(local=LOCAL, statistic=TopR(r=1), groups=np.array([0, 1]), thresholds=np.ones(1)), "thresholds must"),
        (lambda: FleetDetector(local=LOCAL, statistic=TopR(r=1), groups=np.array([0.5]), thresholds=np.ones(1)), "groups must be"),
        (lambda: calibrate_fleet(LOCAL, TopR(r=1), 0, NULL, arl=10, rng=np.random.default_rng(0)), "streams"),
        (lambda: calibrate_fleet(LOCAL, TopR(r=1), 5, NULL, arl=10, rng=np.random.default_rng(0), availability=0.0), "availability"),
        (lambda: calibrate_fleet(LOCAL, TopR(r=1), 5, NULL, arl=10, rng=np.random.default_rng(0), availability=[0.5] * 4), "availability"),
        (lambda: calibrate_fleet(LOCAL, TopR(r=1), 5, NULL, arl=1e6, rng=np.random.default_rng(0), paths=5, horizon=20), "arl"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
