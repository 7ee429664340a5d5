import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import CUSUM, Gaussian, exact_run_length, exact_threshold, likelihood_increment
from detection.bank import Bank, Mirrored, TwoSided
from detection.focus import FOCuS
from detection.states import take

NULL = Gaussian(0.0, 1.0)
DELAYS = {0.5: 57.0, 0.6: 40.7, 0.75: 27.1, 1.0: 16.0, 1.5: 7.9, 2.0: 4.8}


def cusum(shift, **settings):
    return CUSUM(pre=NULL, post=Gaussian(shift, 1.0), **{"threshold": 5.0} | settings)


def run_lengths(detector, rng, streams, mean):
    state, ticks, watched, tick = detector.init(streams), np.zeros(streams), np.arange(streams), 0
    while len(watched):
        tick += 1
        state = detector.step(state, mean + rng.standard_normal(len(watched)))
        alarmed = detector.alarms(state)
        ticks[watched[alarmed]] = tick
        watched, state = watched[~alarmed], take(state, ~alarmed)
    return ticks


def test_a_bank_is_the_highest_of_its_members():
    members = (cusum(0.5), cusum(1.0), FOCuS(threshold=5.0))
    bank, rng = Bank(members=members, threshold=6.0), np.random.default_rng(0)
    state, alone = bank.init(30), [member.init(30) for member in members]
    leads = np.zeros(3, bool)
    for tick in range(80):
        x = rng.standard_normal(30) + (tick > 40)
        state, alone = bank.step(state, x), [member.step(part, x) for member, part in zip(members, alone, strict=True)]
        statistics = np.array([member.statistic(part) for member, part in zip(members, alone, strict=True)])
        changed = np.array([member.changed_at(part) for member, part in zip(members, alone, strict=True)])
        leader = bank.leader(state)
        assert_array_equal(bank.statistic(state), statistics.max(axis=0))
        assert_array_equal(leader, statistics.argmax(axis=0))
        assert_array_equal(bank.changed_at(state), changed[leader, np.arange(30)])
        assert_array_equal(bank.alarms(state), (statistics >= 6.0).any(axis=0))
        leads[leader] = True
    assert leads[2]


def test_members_of_another_threshold_make_no_difference():
    x = np.random.default_rng(1).standard_normal(50) + 1.0
    first, second = (Bank(members=[cusum(1.0, threshold=b)], threshold=6.0) for b in (0.1, 100.0))
    assert_array_equal(first.alarms(first.step(first.init(50), x)), second.alarms(second.step(second.init(50), x)))


def test_the_default_bank_of_shifts_has_a_run_length_of_ten_thousand():
    bank, rng, streams, ticks = Bank.of_shifts(), np.random.default_rng(2), 8000, 2500
    state, alarms = bank.init(streams), 0
    for _ in range(ticks):
        state = bank.step(state, rng.standard_normal(streams))
        alarmed = bank.alarms(state)
        if alarmed.any():
            alarms += int(alarmed.sum())
            state = bank.restart(state, alarmed)
    assert streams * ticks / alarms == pytest.approx(10_000, rel=3 / np.sqrt(alarms))
    assert bank.threshold == 8.16


@pytest.mark.parametrize("shift", DELAYS)
def test_the_default_bank_is_within_a_sixth_of_the_best_single_design_at_every_shift(shift):
    ticks = run_lengths(Bank.of_shifts(), np.random.default_rng(3), 4000, shift)
    assert ticks.mean() == pytest.approx(DELAYS[shift], abs=0.05 + 3.5 * ticks.std() / np.sqrt(len(ticks)))
    best = likelihood_increment(NULL, Gaussian(shift, 1.0))
    assert ticks.mean() < 7 / 6 * exact_run_length(best, Gaussian(shift, 1.0), exact_threshold(best, [NULL], 10_000.0))


def test_the_safe_threshold_of_a_bank_keeps_the_promise():
    # 3 members, each with a run length of at least exp(threshold)
    ticks = run_lengths(Bank.of_shifts(threshold=np.log(3 * 50.0)), np.random.default_rng(4), 200, 0.0)
    assert ticks.mean() > 50.0


def test_a_mirrored_detector_watches_for_falls():
    x = np.random.default_rng(5).standard_normal((20, 50)) - 0.5
    mirrored, plain = Mirrored(detector=cusum(1.0), threshold=5.0), cusum(1.0)
    falls = CUSUM(pre=NULL, post=Gaussian(-1.0, 1.0), threshold=5.0)
    state, same, other = mirrored.init(20), plain.init(20), falls.init(20)
    for column in x.T:
        state, same, other = mirrored.step(state, column), plain.step(same, -column), falls.step(other, column)
        assert_array_equal(mirrored.statistic(state), plain.statistic(same))
        assert_array_equal(mirrored.changed_at(state), plain.changed_at(same))
        assert_allclose(mirrored.statistic(state), falls.statistic(other), rtol=1e-12, atol=1e-12)


def test_a_two_sided_cusum_has_the_run_length_of_two_rates_added():
    # the sides of a CUSUM with h = 4, k = 1/2 have 335.4 each, the two together 168
    one = exact_run_length(likelihood_increment(NULL, Gaussian(1.0, 1.0)), NULL, 4.0)
    ticks = run_lengths(TwoSided(cusum(1.0), threshold=4.0), np.random.default_rng(6), 10_000, 0.0)
    assert ticks.mean() == pytest.approx(one / 2, rel=0.03)
    assert ticks.mean() == pytest.approx(168.0, rel=0.03)


def test_a_two_sided_detector_says_which_way():
    both = TwoSided(cusum(1.0), threshold=4.0)
    state = both.init(2)
    for _ in range(12):
        state = both.step(state, [1.0, -1.0])
    assert both.alarms(state).all()
    assert_array_equal(both.leader(state), [0, 1])
    assert_array_equal(both.changed_at(state), [1, 1])


def test_an_infinite_observation_needs_every_member_to_take_it():
    bank = Bank.of_shifts(clip=4.0)
    assert_array_equal(bank.statistic(bank.step(bank.init(1), [np.inf])), bank.statistic(bank.step(bank.init(1), [4.0])))
    mixed = Bank(members=(cusum(1.0, clip=4.0), cusum(0.5)), threshold=5.0)
    for detector in (mixed, TwoSided(cusum(1.0), threshold=5.0)):
        with pytest.raises(ValueError, match="not allowed, the first is stream 1"):
            detector.step(detector.init(2), [0.0, np.inf])


def test_an_empty_bank_is_refused():
    with pytest.raises(ValueError, match="members"):
        Bank(members=(), threshold=5.0)


def test_both_sides_take_an_infinite_loss_where_they_clip():
    from detection import CUSUM, Gaussian, TwoSided

    bank = TwoSided(CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(1.0, 1.0), threshold=5.0, clip=4.0), threshold=5.0)
    state = bank.init(1)
    for _ in range(2):
        state = bank.step(state, np.array([np.inf]))
    assert bank.alarms(state)[0]
    assert bank.leader(state)[0] == 0
