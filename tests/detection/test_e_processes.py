"""E-processes against sums written out, exact expectations, and the guarantees that make them e-processes."""

import itertools
import pickle
import time

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import CUSUM, Gaussian, Singleton, likelihood_increment
from detection.e_power import AdjustedEProcess, UniformPrior
from detection.e_processes import EProcess, GeometricPrior, PolynomialPrior, e_bh, mean_e, product_e
from detection.states import columns, take

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
Z = likelihood_increment(NULL, SHIFTED)
PRIORS = (PolynomialPrior(), UniformPrior(horizon=40), GeometricPrior(rate=1 / 30))
PROCESS = EProcess(increment=Z, threshold=4.0)
ADJUSTED = AdjustedEProcess(process=PROCESS, threshold=4.0)
every_prior = pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)
every_process = pytest.mark.parametrize("process", [PROCESS, ADJUSTED], ids=("plain", "adjusted"))


def run(process, x, active=None, state=None):
    state = process.init(x.shape[1]) if state is None else state
    for tick, row in enumerate(x):
        state = process.step(state, row, None if active is None else active[tick])
    return state


def assert_equal_bits(a, b):
    for (_, left), (_, right) in zip(columns(a), columns(b), strict=True):
        assert left.tobytes() == right.tobytes()


@every_prior
def test_the_weights_and_what_is_left_of_them_sum_to_one(prior):
    k = np.arange(1, 41)
    spent = np.cumsum(np.exp(prior.log_weight(k)))
    assert_allclose(spent + np.exp(prior.log_unspent(k)), 1.0, atol=1e-12)
    assert prior.log_unspent(np.array([0]))[0] == 0.0


@every_prior
def test_the_recursion_is_the_sum_over_all_change_times(prior):
    process, x = EProcess(increment=Z, prior=prior, threshold=4.0), np.random.default_rng(1).standard_normal((25, 3))
    z, k = Z(x), np.arange(1, 26)
    weights = np.exp(prior.log_weight(k))
    by_hand = sum(weights[start - 1] * np.exp(z[start - 1 :].sum(axis=0)) for start in k) + np.exp(prior.log_unspent(np.array([25])))
    assert_allclose(process.log_e(run(process, x)), np.log(by_hand), atol=1e-12)


@every_prior
def test_the_mean_is_exactly_one_for_a_likelihood_ratio_of_coins(prior):
    class Coin:  # of 0 or 1, fair before the change and 3 to 1 after it
        def __call__(self, x):
            return np.log(np.where(x > 0, 1.5, 0.5))

        def scaled(self, multiplier):
            raise AssertionError

        def at(self, rows):
            return self

    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=10))).T
    process = EProcess(increment=Coin(), prior=prior, threshold=4.0)
    assert_allclose(np.exp(process.log_e(run(process, outcomes))).mean(), 1.0, rtol=1e-12)


def test_evidence_of_thousands_of_nats_neither_overflows_nor_vanishes():
    up, down = np.full((500, 1), 12.0), np.full((500, 1), -12.0)
    assert PROCESS.log_e(run(PROCESS, up))[0] == pytest.approx(500 * 11.5 - np.log(2), abs=1e-4)
    assert PROCESS.log_e(run(PROCESS, down))[0] == pytest.approx(-np.log(501), abs=1e-5)  # what is left of the prior


def test_one_stream_in_control_ever_alarms_no_more_often_than_ville_allows():
    rng, process = np.random.default_rng(2), EProcess(increment=Z, prior=UniformPrior(horizon=300), threshold=np.log(20))
    state, alarmed = process.init(4000), np.zeros(4000, bool)
    for _ in range(300):
        state = process.step(state, rng.standard_normal(4000))
        alarmed |= process.alarms(state)
    assert 0.01 < alarmed.mean() < 0.05


def test_of_takes_the_increments_of_a_detector_with_its_clip():
    detector = CUSUM.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=1000)
    process = EProcess.of(detector, alpha=0.05)
    assert process.threshold == pytest.approx(np.log(20))
    assert process.takes_infinity
    assert np.isfinite(process.step(process.init(1), [np.inf]).log_spent).all()
    with pytest.raises(ValueError, match="alpha"):
        EProcess.of(detector, alpha=1.0)


def test_the_change_estimate_is_that_of_cusum():
    x = np.random.default_rng(3).standard_normal((120, 50))
    x[80:] += 1.0
    cusum = CUSUM(pre=NULL, post=SHIFTED, threshold=5.0)
    assert_array_equal(PROCESS.changed_at(run(PROCESS, x)), cusum.changed_at(run(cusum, x)))


@every_process
def test_a_batch_is_bit_equal_to_its_streams_and_splitting_changes_nothing(process):
    x = np.random.default_rng(4).standard_normal((40, 7))
    whole = run(process, x)
    assert_equal_bits(run(process, x[15:], state=pickle.loads(pickle.dumps(run(process, x[:15])))), whole)
    for stream in range(7):
        assert_equal_bits(run(process, x[:, [stream]]), take(whole, [stream]))


@every_process
def test_an_absent_stream_keeps_its_bits_and_counts_its_own_observations(process):
    rng = np.random.default_rng(5)
    x, active = rng.standard_normal((60, 6)), rng.random((60, 6)) < 0.6
    state = run(process, np.where(active, x, np.nan), active)
    for stream in range(6):
        seen = x[active[:, stream], stream]
        assert_equal_bits(take(state, [stream]), run(process, seen[:, None]))


@every_process
def test_restart_begins_a_new_e_process(process):
    state = run(process, np.random.default_rng(6).standard_normal((20, 3)) + 2.0)
    again = process.restart(state, np.array([True, False, False]))
    assert_equal_bits(take(again, [0]), process.init(1))
    assert_equal_bits(take(again, [1, 2]), take(state, [1, 2]))


def test_a_missing_observation_of_an_active_stream_is_refused():
    with pytest.raises(ValueError, match="first is stream 1"):
        PROCESS.step(PROCESS.init(2), [0.0, np.nan])


@pytest.mark.parametrize(("name", "bad"), [("horizon", lambda: UniformPrior(horizon=0)), ("rate", lambda: GeometricPrior(rate=1.0))])
def test_priors_refuse_what_is_no_prior(name, bad):
    with pytest.raises(ValueError, match=name):
        bad()


@pytest.mark.parametrize("seed", range(5))
def test_e_bh_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    e = rng.pareto(0.7, 50) * 3
    ordered = np.sort(e)[::-1]
    k = max((k for k in range(1, 51) if k * ordered[k - 1] >= 50 / 0.2), default=0)
    expected = e >= 50 / (0.2 * k) if k else np.zeros(50, bool)
    assert_array_equal(e_bh(e, 0.2), expected)


def test_e_bh_at_its_edges():
    assert not e_bh(log_e=[0.0, -np.inf, -3.0], alpha=0.1).any()
    assert_array_equal(e_bh(log_e=[np.inf, -np.inf], alpha=0.1), [True, False])
    assert e_bh(log_e=[np.log(20.0), np.log(10.0)], alpha=0.1).tolist() == [True, True]
    assert e_bh(np.full(1000, 10.0), 0.1).all()  # ties fall together
    for log_e, alpha, message in (
        ([0.0, np.nan], 0.1, "the first is stream 1"),
        ([0.0], 0.0, "alpha"),
        ([], 0.1, "shape"),
        ([[1.0]], 0.1, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            e_bh(log_e=log_e, alpha=alpha)


def test_weights_move_the_bar_to_where_changes_are_expected():
    log_e = np.log(np.array([12.0, 12.0, 1.0, 1.0]))
    assert not e_bh(log_e=log_e, alpha=0.1).any()
    assert_array_equal(e_bh(log_e=log_e, alpha=0.1, weights=[1.9, 1.9, 0.1, 0.1]), [True, True, False, False])
    assert_array_equal(e_bh(log_e=[np.inf, 9.0], alpha=0.1, weights=[0.0, 2.0]), [False, True])
    for weights in ([2.0, 1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0], [1.0]):
        with pytest.raises(ValueError, match="weights"):
            e_bh(log_e=log_e, alpha=0.1, weights=weights)


def test_e_bh_sorts_a_million_streams_in_milliseconds():
    log_e = np.random.default_rng(8).normal(-3.0, 2.0, 1_000_000)
    log_e[:10_000] += 20.0

    def seconds():
        start = time.thread_time()
        e_bh(log_e=log_e, alpha=0.1)
        return time.thread_time() - start

    assert min(seconds() for _ in range(5)) < 0.03


def fleet(runs, prior=PolynomialPrior(), seed=10):  # noqa: B008 - frozen
    """log E (runs, 2000) after 150 ticks; the first 100 streams rose by 1 after 110."""
    rng, changed = np.random.default_rng(seed), np.tile(np.arange(2000) < 100, runs)
    process = EProcess(increment=Z, prior=prior, threshold=4.0)
    state = process.init(2000 * runs)
    for tick in range(150):
        state = process.step(state, rng.standard_normal(2000 * runs) + (changed if tick >= 110 else 0.0))
    return process.log_e(state).reshape(runs, 2000)


def scores(log_e, select):
    """Mean false discovery proportion and power."""
    found = np.array([select(row) for row in log_e])
    false = found[:, 100:].sum(axis=1) / np.maximum(found.sum(axis=1), 1)
    return false.mean(), found[:, :100].mean()


def test_e_bh_finds_nine_of_ten_changed_streams_and_hardly_a_false_one():
    log_e = fleet(60)
    rate, power = scores(log_e, lambda row: e_bh(log_e=row, alpha=0.1))
    assert rate < 0.0005
    assert power == pytest.approx(0.886, abs=0.012)


def bh(p, alpha):
    """Benjamini and Hochberg (1995): whether anything is rejected."""
    ordered = np.sort(p)
    return bool((ordered <= alpha * np.arange(1, len(p) + 1) / len(p)).any())


@pytest.mark.slow
def test_p_values_looked_at_every_tick_always_reject_in_a_quiet_fleet_and_e_values_hardly_ever():
    runs, streams = 40, 500
    rng, cusum = np.random.default_rng(13), CUSUM(pre=NULL, post=SHIFTED, threshold=5.0)
    statistic, process = cusum.init(runs * streams), PROCESS.init(runs * streams)
    by_p, by_e = np.zeros(runs, bool), np.zeros(runs, bool)
    for _ in range(600):
        x = rng.standard_normal(runs * streams)
        statistic, process = cusum.step(statistic, x), PROCESS.step(process, x)
        p = np.exp(-statistic.statistic).reshape(runs, streams)
        log_e = PROCESS.log_e(process).reshape(runs, streams)
        by_p |= [not done and bh(row, 0.1) for done, row in zip(by_p, p, strict=True)]
        by_e |= [e_bh(log_e=row, alpha=0.1).any() for row in log_e]
    assert by_p.all()
    assert by_e.mean() <= 0.15  # the bound is 10 %, measured 3 %


def test_e_values_of_a_group_merge_by_average_or_by_product():
    e, groups = np.array([2.0, 4.0, 0.5, 8.0, 1.0]), np.array([0, 0, 2, 2, 2])
    assert_allclose(np.exp(mean_e(np.log(e), groups, 3)), [3.0, 1.0, 9.5 / 3])
    assert_allclose(np.exp(product_e(np.log(e), groups, 3)), [8.0, 1.0, 4.0])
    assert_allclose(mean_e([5000.0, 0.0, -np.inf], np.array([0, 0, 1]), 2), [5000.0 - np.log(2), -np.inf])
    for wrong in (np.array([0, 1]), np.array([0, 0, 3, 2, 2]), np.array([0, 0, -1, 2, 2])):
        with pytest.raises(ValueError, match="groups"):
            mean_e(np.log(e), wrong, 3)


def test_e_values_are_given_once_and_are_not_negative():
    with pytest.raises(ValueError, match="one of the two"):
        e_bh([1.0], 0.1, log_e=[0.0])
    with pytest.raises(ValueError, match="one of the two"):
        e_bh(alpha=0.1)
    with pytest.raises(ValueError, match="the first is stream 1"):
        e_bh([1.0, -2.0], 0.1)
