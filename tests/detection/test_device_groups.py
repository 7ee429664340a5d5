"""Groups of streams: agreement of the two lists, brute force over all pairs of lists, and planted changes of a device class."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from detection import Gaussian, likelihood_increment
from detection.e_processes import EProcess, mean_e, product_e
from detection.groups import group_discoveries, onsets

GROUPS = np.array([0, 0, 1, 1, 2, 2, 2])
PROCESS = EProcess(increment=likelihood_increment(Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)), threshold=4.0)


def subsets(num):
    return (np.array(chosen, bool) for chosen in itertools.product([False, True], repeat=num))


def agreeing(e, alpha, group_alpha):
    """All pairs of lists that are self-consistent and agree, by brute force."""
    merged = np.exp(mean_e(np.log(e), GROUPS, 3))
    for streams in subsets(7):
        for declared in subsets(3):
            own = all(e[i] >= 7 / (alpha * streams.sum()) and declared[GROUPS[i]] for i in np.flatnonzero(streams))
            theirs = all(merged[g] >= 3 / (group_alpha * declared.sum()) and streams[g == GROUPS].any() for g in np.flatnonzero(declared))
            if own and theirs:
                yield declared, streams


@pytest.mark.parametrize("seed", range(12))
def test_the_lists_are_the_largest_that_are_consistent_and_agree(seed):
    e = np.exp(np.random.default_rng(seed).normal(3.0, 3.0, 7))
    found = group_discoveries(np.log(e), GROUPS, 0.2, group_alpha=0.1)
    pairs = list(agreeing(e, 0.2, 0.1))
    assert any((declared == found.groups).all() and (streams == found.streams).all() for declared, streams in pairs)
    assert found.streams.sum() == max(streams.sum() for _, streams in pairs)
    assert found.groups.sum() == max(declared.sum() for declared, _ in pairs)


def test_nothing_is_declared_in_a_quiet_fleet_and_everything_in_a_loud_one():
    quiet, loud = group_discoveries(np.zeros(7), GROUPS, 0.1), group_discoveries(np.full(7, 50.0), GROUPS, 0.1)
    assert not quiet.groups.any()
    assert not quiet.streams.any()
    assert loud.groups.all()
    assert loud.streams.all()
    with pytest.raises(ValueError, match="groups"):
        group_discoveries(np.zeros(6), GROUPS, 0.1)


def watched(changed, shift, ticks=60, onset=30, seed=0):
    rng, state = np.random.default_rng(seed), PROCESS.init(len(changed))
    for tick in range(ticks):
        state = PROCESS.step(state, rng.standard_normal(len(changed)) + shift * (changed & (tick >= onset)))
    return state


def test_a_device_class_that_drifts_is_named_with_its_streams_and_their_onset():
    groups = np.repeat([0, 1, 2, 3], 250)
    changed = (groups == 2) & (np.arange(1000) % 250 < 125)
    state = watched(changed, 1.5)
    found = group_discoveries(PROCESS.log_e(state), groups, 0.1)
    when = onsets(PROCESS.changed_at(state), found.streams, groups)
    assert_array_equal(found.groups, [False, False, True, False])
    assert found.streams[changed].mean() > 0.9
    assert not found.streams[~changed].any()
    assert abs(when.middle[2] - 31) <= 1
    assert when.late[2] - when.early[2] <= 3
    assert np.isnan(when.middle[[0, 1, 3]]).all()
    assert when.count.sum() == found.streams.sum()


def test_a_product_beats_the_average_where_a_whole_class_changes_and_loses_where_few_of_it_do():
    groups = np.repeat(np.arange(5), 40)
    few = (groups == 3) & (np.arange(200) % 40 < 2)
    log_e = PROCESS.log_e(watched((groups == 1) | few, 1.2, ticks=50, seed=1))
    average, product = mean_e(log_e, groups, 5), product_e(log_e, groups, 5)
    assert product[1] > average[1] + 50.0
    assert average[3] > 3.0 > -50.0 > product[3]
    assert_array_equal(group_discoveries(log_e, groups, 0.1, merge=product_e).groups, [False, True, False, False, False])
    assert_array_equal(group_discoveries(log_e, groups, 0.1).groups, [False, True, False, True, False])


def test_lists_keep_their_levels_when_streams_of_a_class_share_their_noise():
    rng, runs, groups = np.random.default_rng(2), 200, np.repeat(np.arange(10), 20)
    false_streams, false_groups = [], []
    for _ in range(runs):
        state = PROCESS.init(200)
        for tick in range(40):
            shared = rng.standard_normal(10)[groups] * 0.8 + rng.standard_normal(200) * 0.6
            state = PROCESS.step(state, shared + 1.5 * ((groups < 2) & (tick >= 15)))
        found = group_discoveries(PROCESS.log_e(state), groups, 0.4)
        false_streams.append(found.streams[groups >= 2].sum() / max(found.streams.sum(), 1))
        false_groups.append(found.groups[2:].sum() / max(found.groups.sum(), 1))
    assert np.mean(false_streams) < 0.4
    assert np.mean(false_groups) < 0.4
