"""Schedules, the search for a group, and exact bytes."""

import itertools
import time
from math import log

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fedsim.communication import (
    Bytes,
    Candidates,
    Cohort,
    DynaComm,
    DynamicFL,
    Exact,
    FastestGroup,
    FedSGD,
    Intervals,
    Payload,
    RandomGroup,
    Uniform,
    choose_group,
    group_distance,
    sync_points,
    traffic,
)
from fedsim.encoding import decode, encode

MODEL = Payload(parameters=9_640)  # the 64-32-10 perceptron in float32


def cohort_of(counts, *, steps=64, transfer=9_640, speed=None, clients=None, fleet_size=100):
    n = len(counts)
    speed = np.ones(n) if speed is None else np.asarray(speed, float)
    return Cohort(
        clients=np.arange(n) if clients is None else clients,
        steps=steps,
        fleet_size=fleet_size,
        upload=transfer,
        download=transfer,
        step_seconds=0.01 / speed,
        up_seconds=1.0 / speed,
        down_seconds=0.5 / speed,
        counts=np.asarray(counts, float),
        totals=np.asarray(counts, float).sum(0),
    )


def candidates_of(counts, largest, *, law=None, capable=None, costs=None, budget=np.inf, distance="kl"):
    counts = np.asarray(counts, float)
    n = len(counts)
    return Candidates(
        counts=counts,
        law=counts.sum(0) / counts.sum() if law is None else law,
        capable=np.ones(n, bool) if capable is None else capable,
        costs=np.ones(n) if costs is None else costs,
        budget=budget,
        largest=largest,
        distance=distance,
    )


def dirichlet_counts(n, alpha, seed, labels=10):
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(30, rng.dirichlet(np.full(labels, alpha))) for _ in range(n)])


def brute_force(candidates):
    best = np.inf
    for size in range(2, candidates.largest + 1):
        for group in itertools.combinations(range(len(candidates.counts)), size):
            p = candidates.counts[list(group)].sum(0) / candidates.counts[list(group)].sum()
            best = min(best, sum(a * log(a / b) for a, b in zip(p, candidates.law, strict=True) if a > 0))
    return best


def test_sync_points_number_the_rounded_up_quotient_and_end_the_round():
    for interval, steps in itertools.product(range(1, 20), range(1, 40)):
        points = sync_points(interval, steps)
        assert len(points) == max(1, -(-steps // interval))
        assert points[-1] == steps


def test_the_ends_of_the_schedule_are_fedsgd_and_fedavg():
    cohort = cohort_of(np.ones((3, 2)), steps=5)
    assert FedSGD().assign(cohort, 0, 0).points == ((1, 2, 3, 4, 5),) * 3
    assert Uniform().assign(cohort, 0, 0).points == ((5,),) * 3
    assert Uniform(interval=99).assign(cohort, 0, 0).points == ((5,),) * 3


def test_a_large_group_costs_the_bytes_computed_by_hand():
    schedule = DynamicFL(high=1, budget=0.3, tolerance=0.0).assign(cohort_of(np.eye(10) * 20), 0, 0)
    cost = traffic(schedule.points, Payload(parameters=9_640, scalars=8).total, MODEL.total)
    assert len(schedule.group) == 3
    assert cost.uploads.sum() == schedule.uploads == 199
    assert cost.bytes_up.sum() == 1_918_360 + 199 * 8
    assert cost.bytes_down.sum() == 1_918_360


def test_distance_of_the_whole_fleet_is_zero_and_of_m_balanced_labels_log_of_the_ratio():
    counts = np.eye(10) * 7
    law = np.full(10, 0.1)
    assert group_distance(counts.sum(0), law) == pytest.approx(0.0, abs=1e-15)
    for m in range(1, 10):
        assert group_distance(counts[:m].sum(0), law) == pytest.approx(log(10 / m))


def test_a_label_the_law_lacks_and_an_empty_histogram_are_infinitely_far():
    assert group_distance(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == np.inf
    assert group_distance(np.zeros(2), np.array([0.5, 0.5])) == np.inf


def test_squared_distance_is_the_sum_of_squared_differences():
    assert group_distance(np.array([3.0, 1.0]), np.array([0.5, 0.5]), "squared") == pytest.approx(0.125)


@pytest.mark.parametrize("seed", range(4))
def test_exact_search_equals_brute_force(seed):
    candidates = candidates_of(dirichlet_counts(8, 0.1, seed), 4)
    _, distances = Exact().groups(candidates, np.random.default_rng(0))
    assert distances.min() == pytest.approx(brute_force(candidates), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_the_papers_search_is_never_better_than_exact_and_on_average_close(alpha):
    gaps = []
    for seed in range(8):
        candidates = candidates_of(dirichlet_counts(15, alpha, seed), 5)
        best = Exact().groups(candidates, np.random.default_rng(0))[1].min()
        members, found = DynaComm().groups(candidates, np.random.default_rng(seed))
        swapped = DynaComm(swap=True).groups(candidates, np.random.default_rng(seed))[1].min()
        assert members.sum(1).min() >= 2
        assert members.sum(1).max() <= 5
        assert_allclose(found, [group_distance(candidates.counts[m].sum(0), candidates.law) for m in members])
        assert best - 1e-12 <= swapped <= found.min() + 1e-12
        random = np.random.default_rng(seed).permutation(15)[:5]
        gaps.append((found.min() - best, group_distance(candidates.counts[random].sum(0), candidates.law) - best))
    ours, theirs = np.mean(gaps, axis=0)
    assert ours < 0.2 * theirs


@pytest.mark.parametrize("search", [Exact(), DynaComm()])
def test_balanced_single_labels_give_log_ten_thirds(search):
    _, distance = choose_group(candidates_of(np.eye(10) * 18, 3), search, 0.0, np.random.default_rng(0))
    assert distance == pytest.approx(log(10 / 3))


@pytest.mark.parametrize("search", [Exact(), DynaComm(), DynaComm(swap=True)])
def test_the_search_keeps_to_capable_clients_and_to_the_budget(search):
    rng = np.random.default_rng(3)
    capable, costs = rng.random(12) < 0.7, rng.integers(1, 5, 12).astype(float)
    members, _ = search.groups(candidates_of(dirichlet_counts(12, 0.3, 3), 6, capable=capable, costs=costs, budget=9.0), rng)
    assert len(members)
    assert not members[:, ~capable].any()
    assert (members @ costs <= 9.0).all()


@pytest.mark.parametrize("search", [Exact(), DynaComm()])
def test_without_two_feasible_clients_there_is_no_group(search):
    alone = candidates_of(np.eye(4), 3, capable=np.array([True, False, False, False]))
    group, distance = choose_group(alone, search, 0.1, np.random.default_rng(0))
    assert len(group) == 0
    assert np.isnan(distance)


def test_near_ties_rotate_over_rounds_and_a_strict_minimum_does_not():
    counts = np.eye(10) * np.linspace(17.0, 18.5, 10)[:, None]
    drawn = {tol: {tuple(DynamicFL(tolerance=tol).assign(cohort_of(counts), r, 0).group) for r in range(12)} for tol in (0.0, 0.1)}
    assert len(drawn[0.1]) > len(drawn[0.0])


def test_a_group_is_a_function_of_seed_and_round():
    cohort = cohort_of(dirichlet_counts(20, 0.3, 0))
    a, b = (DynamicFL().assign(cohort, 5, 1) for _ in range(2))
    assert_array_equal(a.group, b.group)


def test_without_a_feasible_group_the_round_is_fedavg_and_says_so():
    schedule = DynamicFL(budget=1.0, clients=0.01).assign(cohort_of(np.eye(10), clients=np.arange(90, 100)), 0, 0)
    assert schedule.points == ((64,),) * 10
    assert "no group" in schedule.note


def test_skip_leaves_the_others_out_and_discount_lowers_their_share():
    cohort = cohort_of(np.eye(10))
    only_high = DynamicFL(skip=True).assign(cohort, 0, 0)
    assert sum(1 for p in only_high.points if not p) == 7
    assert only_high.uploads == 3 * 64
    discounted = DynamicFL(discount=0.1).assign(cohort, 0, 0)
    assert sorted(discounted.share_at_end) == [0.1] * 7 + [1.0] * 3


def test_low_beyond_the_round_is_clipped_and_said_once():
    dynamic = DynamicFL(low=256)
    cohort = cohort_of(np.eye(10), steps=16)
    assert set(map(len, dynamic.assign(cohort, 0, 0).points)) == {1, 16}
    assert "clipped" in dynamic.assign(cohort, 0, 0).note
    assert dynamic.assign(cohort, 1, 0).note == ""


def test_a_budget_in_bytes_buys_whole_members():
    transfer = 64 * 2 * 9_640
    cohort = cohort_of(np.eye(10))
    assert len(DynamicFL(budget=Bytes(4 * transfer + 5), tolerance=0.0).assign(cohort, 0, 0).group) == 4


def test_by_link_admits_those_who_do_not_prolong_the_round():
    speed = np.array([100.0] * 3 + [1.0] * 7)
    schedule = DynamicFL(budget=1.0, clients="by-link").assign(cohort_of(np.eye(10), speed=speed), 0, 0)
    assert set(schedule.group) <= {0, 1, 2}
    assert len(schedule.group) >= 2


def test_a_share_of_capable_clients_is_drawn_once():
    able = set()
    for r in range(20):
        able |= set(DynamicFL(budget=1.0, clients=0.3, tolerance=5.0).assign(cohort_of(np.eye(10), fleet_size=10), r, 0).group.tolist())
    assert 2 <= len(able) <= 3


def test_controls_choose_at_random_and_by_speed():
    cohort = cohort_of(np.eye(10), speed=np.arange(1, 11))
    assert_array_equal(FastestGroup(size=3).assign(cohort, 0, 0).group, [7, 8, 9])
    groups = [tuple(RandomGroup(size=3).assign(cohort, r, 0).group) for r in range(10)]
    assert {len(g) for g in groups} == {3}
    assert len(set(groups)) > 5


def test_uniform_of_equal_bytes_spends_what_the_two_levels_may():
    uniform = Uniform.of_equal_bytes(DynamicFL(high=1, budget=0.3), cohort=10, steps=64)
    assert uniform == Uniform(uploads=20)
    points = uniform.assign(cohort_of(np.eye(10)), 0, 0).points[0]
    assert points == tuple(round(64 * (j + 1) / 20) for j in range(20))
    assert len(set(points)) == 20


def test_explicit_points_are_for_all_or_for_each():
    assert Intervals.explicit([2, 5]).points == ((2, 5),)
    assert Intervals.explicit([[1, 5], [5]]).points == ((1, 5), (5,))
    assert not Intervals.explicit([[1, 5], [5]]).uniform


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DynamicFL(high=0), "high"),
        (lambda: DynamicFL(high=8, low=4), "low"),
        (lambda: DynamicFL(budget=0.0), "budget"),
        (lambda: DynamicFL(budget=1.5), "budget"),
        (lambda: DynamicFL(discount=2.0), "discount"),
        (lambda: DynamicFL(tolerance=-1.0), "tolerance"),
        (lambda: DynamicFL(clients="fast"), "clients"),
        (lambda: DynamicFL(distance="l1"), "distance"),
        (lambda: Bytes(0), "budget"),
        (lambda: Uniform(interval=0), "interval"),
        (lambda: Uniform(interval=2, uploads=2), "not both"),
        (lambda: RandomGroup(size=1), "size"),
        (lambda: DynaComm(permutations=0), "permutations"),
        (lambda: Intervals.explicit([3, 2]), "increasing"),
        (lambda: Intervals.explicit([[2, 4], [3]]), "end at"),
        (lambda: DynamicFL(high=65).validate(20, 64, 1), "high"),
        (lambda: DynamicFL(budget=0.3).validate(6, 64, 1), "fewer than two"),
        (lambda: DynamicFL(budget=Bytes(100)).validate(20, 64, 1), "fewer than two"),
        (lambda: DynamicFL(search=Exact()).validate(60, 64, 1), "DynaComm"),
        (lambda: Uniform(uploads=65).validate(20, 64, 1), "uploads"),
        (lambda: Intervals.explicit([2, 5]).validate(20, 64, 1), "local_steps"),
    ],
)
def test_bad_schedules_are_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "schedule", [Uniform(interval=4), DynamicFL(budget=Bytes(10**9), search=Exact()), FastestGroup(size=4), Intervals.explicit([2, 5])]
)
def test_schedules_survive_encoding(schedule):
    assert decode(*encode(schedule)) == schedule


def test_a_search_among_a_hundred_clients_takes_a_quarter_of_a_second():
    candidates = candidates_of(dirichlet_counts(100, 0.1, 0, labels=62), 30)
    DynaComm().groups(candidates, np.random.default_rng(0))
    start = time.process_time()
    DynaComm(permutations=10).groups(candidates, np.random.default_rng(0))
    assert time.process_time() - start < 0.25
