"""Closed e-BH against its definition, boosts and adjusters against their promises, and discoveries that are never taken back."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import Gaussian, likelihood_increment
from detection.discoveries import StoppedEBH
from detection.e_power import AdjustedEProcess, UniformPrior, closed_e_bh, log_adjusted, log_boost
from detection.e_processes import EProcess, PolynomialPrior, e_bh
from detection.states import columns, from_bytes, take, to_bytes

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
Z = likelihood_increment(NULL, SHIFTED)
PROCESS = EProcess(increment=Z, threshold=4.0)
ADJUSTED = AdjustedEProcess(process=PROCESS, threshold=4.0)
every_process = pytest.mark.parametrize("process", [PROCESS, ADJUSTED], ids=("plain", "adjusted"))


def run(process, x, active=None, state=None):
    state = process.init(x.shape[1]) if state is None else state
    for tick, row in enumerate(x):
        state = process.step(state, row, None if active is None else active[tick])
    return state


def assert_equal_bits(a, b):
    for (_, left), (_, right) in zip(columns(a), columns(b), strict=True):
        assert left.tobytes() == right.tobytes()


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


def test_a_uniform_prior_gives_nothing_beyond_its_horizon():
    prior = UniformPrior(horizon=3)
    assert_array_equal(prior.log_weight(np.array([3, 4])), [-np.log(3), -np.inf])
    x = np.random.default_rng(0).standard_normal((10, 5))
    assert np.isfinite(run(EProcess(increment=Z, prior=prior, threshold=4.0), x).log_spent).all()


def test_the_adjuster_integrates_to_one():
    from scipy.integrate import quad

    mass = quad(lambda log_y: np.exp(log_adjusted(np.array(log_y)) - log_y), 0, 50, limit=200)[0]
    assert mass == pytest.approx(1 - 1 / 50, abs=2e-3)  # the tail beyond log y = 50 is 1/50
    near = np.array([0.0, 0.019999, 0.02, 0.020001])
    assert_allclose(np.diff(log_adjusted(near)), [0.0066, 0, 0], atol=1e-3)
    assert log_adjusted(np.array([0.0]))[0] == pytest.approx(-np.log(2))


def test_adjusted_evidence_never_falls_and_its_supremum_has_mean_at_most_one():
    rng, state = np.random.default_rng(7), ADJUSTED.init(20_000)
    before = ADJUSTED.log_e(state)
    for _ in range(100):
        state = ADJUSTED.step(state, rng.standard_normal(20_000))
        assert (ADJUSTED.log_e(state) >= before).all()
        before = ADJUSTED.log_e(state)
    assert np.exp(before).mean() < 1.0


def brute_force_closure(e, alpha):
    """Sizes of all top sets R with mean(e[S]) >= |R & S| / (alpha |R|) for each of the 2^n - 1 sets S."""
    order = np.argsort(-e)
    members = np.array(list(itertools.product([False, True], repeat=len(e)))[1:])
    means = (members * e).sum(axis=1) / members.sum(axis=1)
    good = []
    for size in range(1, len(e) + 1):
        inside = members[:, order[:size]].sum(axis=1)
        if (means >= inside / (alpha * size) * (1 - 1e-9)).all():
            good.append(size)
    return good


def test_closed_e_bh_is_in_its_closure_contains_e_bh_and_almost_always_finds_the_largest_set():
    rng, largest, gained = np.random.default_rng(9), 0, 0
    for _ in range(200):
        e = np.exp(rng.normal(0.5, 2.0, 8))
        good = brute_force_closure(e, 0.2)
        found, plain = closed_e_bh(np.log(e), 0.2), e_bh(log_e=np.log(e), alpha=0.2)
        assert found.sum() == 0 if not good else found.sum() in [0, *good]
        assert (found | ~plain).all()
        assert found.sum() == 0 or e[found].min() >= e[~found].max(initial=0.0)
        largest += found.sum() == max(good, default=0)
        gained += found.sum() > plain.sum()
    assert largest >= 196
    assert gained >= 20


def test_at_one_tick_known_beforehand_a_boost_and_a_better_prior_find_nearly_all():
    reciprocal, uniform = fleet(10), fleet(10, UniformPrior(horizon=200))
    boost = log_boost(PROCESS, NULL, SHIFTED, alpha=0.1, streams=2000, tick=150, rng=np.random.default_rng(11))
    assert boost == pytest.approx(6.3, abs=0.15)
    results = {
        "plain": scores(reciprocal, lambda row: e_bh(log_e=row, alpha=0.1)),
        "closed": scores(reciprocal, lambda row: closed_e_bh(row, 0.1)),
        "boosted": scores(reciprocal, lambda row: e_bh(log_e=row + boost, alpha=0.1)),
        "uniform": scores(uniform, lambda row: e_bh(log_e=row, alpha=0.1)),
        "uniform, closed": scores(uniform, lambda row: closed_e_bh(row, 0.1)),
    }
    power = {name: found for name, (_, found) in results.items()}
    assert max(rate for rate, _ in results.values()) < 0.03
    assert power["plain"] <= power["closed"] < power["uniform"] <= power["uniform, closed"]
    assert power["boosted"] > power["plain"] + 0.08


def test_a_boosted_null_fleet_is_still_within_its_level():
    rng, process, runs = np.random.default_rng(12), EProcess(increment=Z, threshold=4.0), 400
    boost = log_boost(process, NULL, SHIFTED, alpha=0.1, streams=200, tick=60, rng=rng)
    state = run(process, rng.standard_normal((60, 200 * runs)))
    rejecting = np.mean([e_bh(log_e=row + boost, alpha=0.1).any() for row in process.log_e(state).reshape(runs, 200)])
    assert 0.01 < rejecting < 0.1 + 2 * np.sqrt(0.1 * 0.9 / runs)
    assert boost > 3


def stopped(process, x, alpha=0.1, active=None):
    watch = StoppedEBH(process=process, alpha=alpha)
    state, history = watch.init(x.shape[1]), []
    for tick, row in enumerate(x):
        state = watch.step(state, row, None if active is None else active[tick])
        history.append(watch.discoveries(state))
    return watch, state, np.array(history)


@every_process
def test_discoveries_are_never_taken_back_and_their_evidence_is_frozen(process):
    x = np.random.default_rng(14).standard_normal((150, 300))
    x[60:100, :30] += 1.5  # the change goes away again
    watch, state, history = stopped(process, x)
    assert (history[1:] | ~history[:-1]).all()
    assert history[-1][:30].mean() > 0.9
    found = watch.discoveries(state)
    assert_array_equal(state.found[found], history[:, found].argmax(axis=0) + 1)
    frozen = run(process, x[: state.found[0], [0]])
    assert process.statistic(take(state.process, [0])) == process.statistic(frozen)
    assert np.abs(watch.changed_at(state)[:30] - 61).mean() < 6


def test_plain_e_bh_over_time_takes_discoveries_back():
    x = np.random.default_rng(15).standard_normal((200, 300))
    x[60:100, :30] += 1.5
    assert e_bh(log_e=PROCESS.log_e(run(PROCESS, x[:100])), alpha=0.1)[:30].mean() > 0.9
    assert e_bh(log_e=PROCESS.log_e(run(PROCESS, x)), alpha=0.1)[:30].mean() < 0.9


@pytest.mark.slow
def test_the_whole_history_of_discoveries_keeps_its_level_where_power_is_scarce():
    """Few streams, a high level, changes at the end: the worst case for a bound on false discoveries."""
    runs, streams, alpha = 200, 20, 0.5
    rng, process = np.random.default_rng(16), EProcess(increment=Z, prior=UniformPrior(horizon=60), threshold=4.0)
    worst = np.zeros(runs)
    for r in range(runs):
        x = rng.standard_normal((60, streams))
        x[50:, :4] += 1.5
        _, state, history = stopped(process, x, alpha)
        false = history & (np.arange(streams) >= 4) | history & (state.found <= 50)
        worst[r] = (false.sum(axis=1) / np.maximum(history.sum(axis=1), 1)).max()
    assert 0.02 < worst.mean() < alpha


def test_a_watch_survives_dropout_bytes_and_restart():
    rng = np.random.default_rng(17)
    x, active = rng.standard_normal((100, 40)), rng.random((100, 40)) < 0.5
    x[30:, :10] += 2.0
    watch, state, _ = stopped(PROCESS, np.where(active, x, np.nan), active=active)
    assert watch.discoveries(state)[:10].all()
    assert_equal_bits(from_bytes(to_bytes(state), watch.init(1)), state)
    again = watch.restart(state, watch.discoveries(state))
    assert not watch.discoveries(again).any()
    assert (again.tick == 100).all()
    with pytest.raises(ValueError, match="alpha"):
        StoppedEBH(process=PROCESS, alpha=1.5)
