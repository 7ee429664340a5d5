import numpy as np
import pytest

from detection import Gaussian, exact_run_length, exact_threshold, late_delay, likelihood_increment
from detection.costs import Costs, cost_optimal_arl, cost_per_tick
from detection.run_length import random_change

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
INCREMENT = likelihood_increment(NULL, SHIFTED)
COSTS = Costs(alarm=40.0, harm=1.0, change_every=400.0, response=3.0)


def simulated(threshold, costs, streams=2000, ticks=6000, seed=0):
    """Cost per tick, false alarms and mean delay of the policy, played tick by tick."""
    rng = np.random.default_rng(seed)
    statistic, changed, waiting = np.zeros(streams), np.zeros(streams, bool), np.zeros(streams, int)
    alarms = harmed = false = late = changes = 0
    for _ in range(ticks):
        answered = waiting == 1
        changed &= ~answered
        waiting = np.maximum(waiting - 1, 0)
        watched = waiting == 0
        new = watched & ~changed & (rng.random(streams) < 1 / costs.change_every)
        changes += int(new.sum())
        changed |= new
        harmed += int(changed.sum())
        late += int((changed & watched).sum())
        statistic = np.where(watched, np.maximum(statistic + INCREMENT(rng.standard_normal(streams) + changed), 0.0), 0.0)
        fired = statistic >= threshold
        statistic[fired] = 0.0
        alarms += int(fired.sum())
        false += int((fired & ~changed).sum())
        waiting[fired & changed] = int(costs.response) + 1
    return (costs.alarm * alarms + costs.harm * harmed) / (streams * ticks), false / changes, late / changes


@pytest.mark.parametrize("threshold", [2.0, 3.5, 5.0])
def test_false_alarms_delays_and_costs_are_those_of_the_policy_played_out(threshold):
    cost, false_alarms, delay = simulated(threshold, COSTS)
    exact = random_change(INCREMENT, NULL, SHIFTED, threshold, COSTS.change_every)
    assert exact == pytest.approx((false_alarms, delay), rel=0.03)
    assert cost_per_tick(INCREMENT, NULL, SHIFTED, threshold, COSTS) == pytest.approx(cost, rel=0.02)


def test_rare_changes_have_the_delay_of_late_ones_and_false_alarms_at_the_rate_of_the_run_length():
    false_alarms, delay = random_change(INCREMENT, NULL, SHIFTED, 4.0, 1e6)
    assert false_alarms == pytest.approx(1e6 / exact_run_length(INCREMENT, NULL, 4.0), rel=1e-3)
    assert delay == pytest.approx(late_delay(INCREMENT, NULL, SHIFTED, 4.0), rel=0.01)


def test_a_change_at_the_second_tick_or_so_meets_a_fresh_statistic():
    assert random_change(INCREMENT, NULL, SHIFTED, 4.0, 1 + 1e-9)[1] == pytest.approx(exact_run_length(INCREMENT, SHIFTED, 4.0))


@pytest.mark.parametrize("costs", [COSTS, Costs(alarm=5.0, harm=1.0, change_every=400.0), Costs(alarm=40.0, harm=0.3, change_every=5000.0)])
def test_the_optimum_is_the_least_of_a_fine_brute_search(costs):
    found = cost_optimal_arl(INCREMENT, NULL, SHIFTED, costs)
    thresholds = np.linspace(exact_threshold(INCREMENT, [NULL], 2.0), exact_threshold(INCREMENT, [NULL], 1e6), 120)
    brute = [cost_per_tick(INCREMENT, NULL, SHIFTED, b, costs, states=200) for b in thresholds]
    assert found.cost <= min(brute) * (1 + 1e-4)
    assert found.threshold == pytest.approx(thresholds[np.argmin(brute)], abs=2 * (thresholds[1] - thresholds[0]))
    assert found.arl == pytest.approx(exact_run_length(INCREMENT, NULL, found.threshold))
    assert costs.per_tick(found.false_alarms, found.delay) == found.cost


def test_the_optimum_beats_its_neighbours_when_they_are_played_out():
    best = cost_optimal_arl(INCREMENT, NULL, SHIFTED, COSTS).threshold
    costs = [simulated(b, COSTS)[0] for b in (best - 1.5, best, best + 2.0)]
    assert costs[1] == min(costs)


def test_dearer_alarms_and_rarer_changes_ask_for_longer_runs():
    def arl(**changed):
        return cost_optimal_arl(INCREMENT, NULL, SHIFTED, Costs(**{"alarm": 40.0, "harm": 1.0, "change_every": 400.0, **changed})).arl

    assert arl(alarm=100.0) > 1.5 * arl() > 3 * arl(harm=4.0)
    assert arl(change_every=4000.0) > arl()


def test_costs_whose_optimum_is_no_threshold_are_refused():
    with pytest.raises(ValueError, match="an arl of 2, an end"):
        cost_optimal_arl(INCREMENT, NULL, SHIFTED, Costs(alarm=1e-6, harm=1.0, change_every=50.0))
    with pytest.raises(ValueError, match="an arl of 1e"):
        cost_optimal_arl(INCREMENT, NULL, SHIFTED, Costs(alarm=1e4, harm=1e-3, change_every=50.0))


@pytest.mark.parametrize("wrong", [{"alarm": 0}, {"harm": -1.0}, {"change_every": 1.0}, {"response": -1}, {"alarm": np.nan}])
def test_costs_that_are_none_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Costs(**{"alarm": 1.0, "harm": 1.0, "change_every": 10.0, **wrong})
    with pytest.raises(ValueError, match="every must be above 1"):
        random_change(INCREMENT, NULL, SHIFTED, 3.0, 1.0)
