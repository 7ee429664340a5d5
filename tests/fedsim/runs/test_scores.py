"""Scores against brute force, other libraries, and worlds small enough to score by hand."""

import numpy as np
import pytest
from scipy import stats

from fedsim.records import Alarm, Event, Redeployment, Rejected, Request, Started
from fedsim.runs.schema import arrow_table, column, empty_table, tabulate
from fedsim.runs.scores import NEVER, accuracy_over_time, by_tick, detection_delays, gains, repair_delays, score
from fedsim.runs.survival import kaplan_meier, poisson_interval


def brute_force_survival(times, observed, at):
    """Product over event times up to ``at`` of the share that does not have the event, one client at a time."""
    survival = 1.0
    for t in sorted({t for t, seen in zip(times, observed, strict=True) if seen and t <= at}):
        at_risk = sum(other >= t for other in times)
        died = sum(other == t and seen for other, seen in zip(times, observed, strict=True))
        survival *= 1 - died / at_risk
    return survival


@pytest.mark.parametrize("seed", range(50))
def test_kaplan_meier_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 40))
    times, observed = rng.integers(0, 15, size), rng.random(size) < rng.random()
    curve = kaplan_meier(times, observed)
    for t, s in zip(curve.times, curve.survival, strict=True):
        assert s == pytest.approx(brute_force_survival(times, observed, t), abs=1e-12)
    assert curve.times.tolist() == sorted(set(times[observed].tolist()))
    fine = np.arange(0, times.max(), 0.25)
    area = 0.25 * sum(brute_force_survival(times, observed, t) for t in fine)
    assert curve.restricted_mean == pytest.approx(area)


def test_kaplan_meier_equals_scipy():
    rng = np.random.default_rng(0)
    times, observed = rng.integers(1, 30, 200), rng.random(200) < 0.6
    theirs = stats.ecdf(stats.CensoredData(uncensored=times[observed], right=times[~observed])).sf
    ours = kaplan_meier(times, observed)
    steps = np.isin(theirs.quantiles, ours.times)
    np.testing.assert_allclose(ours.survival, theirs.probabilities[steps])


def test_without_censoring_the_median_and_mean_are_the_sample_ones():
    curve = kaplan_meier([5, 1, 3, 2, 4], np.ones(5, bool))
    assert (curve.median, curve.restricted_mean) == (3, pytest.approx(3))


def test_a_curve_that_ends_above_one_half_has_no_median():
    assert np.isnan(kaplan_meier([1, 2, 3], [True, False, False]).median)
    assert np.isnan(kaplan_meier([], []).median)
    assert np.isnan(kaplan_meier([], []).restricted_mean)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_poisson_interval_puts_its_error_in_the_two_tails(count):
    low, high = poisson_interval(count, 10.0)
    assert stats.poisson.cdf(count, 10 * high) == pytest.approx(0.025)
    assert low == 0 if count == 0 else stats.poisson.sf(count - 1, 10 * low) == pytest.approx(0.025)
    assert np.isnan(poisson_interval(0, 0)).all()


def world(events, changes, *, ticks=20, accuracy=None, loss=None, statistic=None):
    """Tables of a fleet in which client c changes at ``changes[c]`` and is right and pays as given by functions of (client, tick)."""
    tick, client = (a.ravel() for a in np.meshgrid(np.arange(ticks), np.arange(len(changes)), indexing="ij"))
    values = {"loss": loss or (lambda c, t: 0.0), "accuracy": accuracy or (lambda c, t: 1.0), "statistic": statistic or (lambda c, t: 0.0)}
    columns = {name: [float(f(c, t)) for c, t in zip(client, tick, strict=True)] for name, f in values.items()}
    fixed = {"dense_loss": 0.5, "dense_accuracy": 1.0}
    return {
        "ticks": arrow_table("ticks", {"tick": tick, "client": client, **columns, **fixed}),
        "events": arrow_table("events", tabulate(events)["events"]) if events else empty_table("events"),
        "truth": arrow_table("truth", {"client": np.arange(len(changes)), "drift": 0, "change_at": np.array(changes)}),
    }


def scored(*args, **kwargs):
    return score(rounds=empty_table("rounds"), **world(*args, **kwargs))


def test_alarms_are_told_apart_by_hand():
    alarms = [(3, 0), (12, 0), (15, 0), (10, 1), (7, 3)]  # early, detection, repeat; detection; on a client that never changes
    scores = scored([Alarm(tick=t, client=c) for t, c in alarms], [10, 10, 10, -1])
    assert (scores.num_clients, scores.num_changed, scores.num_ticks) == (4, 3, 20)
    assert (scores.detected, scores.misses, scores.repeats, scores.false_alarms) == (2, 1, 1, 2)
    assert scores.median_delay == 2  # 2, 0, and one that never came within the ten ticks left
    assert scores.mean_delay == pytest.approx((2 + 0 + 10) / 3)
    in_control = 3 * 10 + 20
    assert scores.false_alarm_rate == pytest.approx(1000 * 2 / in_control)
    assert scores.run_length == in_control / 2
    low, high = poisson_interval(2, in_control / 1000)
    assert (scores.false_alarm_low, scores.false_alarm_high) == (low, high)


def test_only_watched_ticks_before_the_change_count_for_false_alarms():
    def statistic(client, tick):  # clients learn for 4 ticks; an action of client 1 is in flight over ticks 8 to 11
        return np.nan if tick < 4 or (client == 1 and 8 <= tick < 12) else 1.0

    scores = scored([Alarm(tick=7, client=1), Alarm(tick=15, client=1)], [10, -1], statistic=statistic)
    watched = (10 - 4) + (20 - 4 - 4)
    assert (scores.false_alarms, scores.run_length) == (2, watched / 2)
    assert scores.false_alarm_rate == pytest.approx(1000 * 2 / watched)
    assert (scores.false_alarm_low, scores.false_alarm_high) == poisson_interval(2, watched / 1000)
    assert np.isnan(scored([], [10, -1], statistic=lambda c, t: np.nan).false_alarm_rate), "nobody was ever watched"


def test_a_redeployment_asked_for_before_the_change_is_no_repair_of_it():
    early = [Request(tick=45, client=0, job=3), Redeployment(tick=51, client=0, job=3), Alarm(tick=60, client=0)]
    tables = world(early, [50], ticks=80)
    scores = score(rounds=empty_table("rounds"), **tables)
    assert (scores.detected, scores.misses, scores.median_delay) == (1, 0, 10)
    assert np.isnan(scores.median_repair)
    other = [Request(tick=50, client=1, job=0), Redeployment(tick=52, client=1, job=0)]
    since = [*early, Request(tick=60, client=0, job=4), Redeployment(tick=66, client=0, job=4), *other]
    assert repair_delays(**world(since, [50, 50], ticks=80)).ticks.tolist() == [16, 2]


def test_a_redeployment_asked_for_at_the_change_repairs_it():
    events = [Request(tick=50, client=0, job=0), Redeployment(tick=55, client=0, job=0), Alarm(tick=60, client=0)]
    scores = scored(events, [50], ticks=80)
    assert (scores.detected, scores.misses, scores.median_repair) == (0, 0, 5)


def test_the_submodels_a_fleet_starts_with_are_bytes_of_their_own(tables):
    pick = ("rounds", "ticks", "events", "truth", "deployments")
    scores = score(**{name: tables[name] for name in pick})
    assert scores.bytes_deploy == column(tables["deployments"], "bytes").sum() > 0
    assert score(**{name: tables[name] for name in pick[:-1]}).bytes_deploy == 0


def test_a_repair_censors_the_delay_and_is_no_miss():
    tables = world([Redeployment(tick=14, client=0), Alarm(tick=16, client=0)], [10])
    delays = detection_delays(**tables)
    assert (delays.ticks.tolist(), delays.observed.tolist(), delays.repaired.tolist()) == ([4], [False], [True])
    scores = score(rounds=empty_table("rounds"), **tables)
    assert (scores.detected, scores.misses) == (0, 0)
    assert np.isnan([scores.median_delay, scores.mean_delay]).all()
    assert (repair_delays(**tables).ticks.tolist(), scores.median_repair) == ([4], 4)


def test_a_change_beyond_the_run_is_no_change():
    scores = scored([], [500, -1])
    assert scores.num_changed == 0
    assert np.isnan([scores.accuracy_after, scores.median_delay, scores.fleet_after, scores.precision, scores.harm_changed]).all()
    assert scores.misses == 0


def test_of_several_drifts_the_first_one_counts():
    tables = world([], [-1, -1])
    tables["truth"] = arrow_table("truth", {"client": [0, 0, 1], "drift": [0, 1, 0], "change_at": [12, 8, -1]})
    assert score(rounds=empty_table("rounds"), **tables).accuracy_before == 1
    assert detection_delays(**tables).ticks.tolist() == [12]


def test_accuracy_is_split_at_each_clients_own_change():
    def accuracy(client, tick):
        changed = (client == 0 and tick >= 10) or (client == 1 and tick >= 15)
        return (0.8 if tick >= 18 else 0.2) if changed else 1.0

    scores = scored([], [10, 15, -1], accuracy=accuracy)
    assert scores.accuracy_before == 1.0
    assert scores.accuracy_after == pytest.approx((8 * 0.2 + 2 * 0.8 + 3 * 0.2 + 2 * 0.8) / 15)
    assert scores.accuracy_end == pytest.approx((2 * 0.2 + 2 * 2 * 0.8 + 2 * 0.2) / 8)  # the last fifth: ticks 16 to 19
    assert scores.fleet_before == 1.0
    assert scores.dense_after == 1.0


def test_harm_is_loss_above_the_dense_model_from_the_first_change_on():
    scores = scored([], [10, -1], loss=lambda c, t: 2.0 if c == 0 and t >= 10 else 0.25)
    assert scores.harm == pytest.approx(10 * 1.5 - 10 * 0.25)
    assert scores.harm_positive == pytest.approx(10 * 1.5)
    assert scores.harm_changed == pytest.approx(10 * 1.5)


def test_jobs_cost_their_seconds_once_and_bytes_add_up():
    events = [
        Request(tick=10, client=0, job=0),
        Started(tick=11, client=0, job=0, seconds=3.5, bytes=100),
        Redeployment(tick=15, client=0, job=0, seconds=3.5, bytes=700),
        Request(tick=10, client=1, job=1),
        Started(tick=12, client=1, job=1, seconds=2.0, bytes=100),
        Rejected(tick=15, client=1, job=1),
    ]
    scores = scored(events, [10, -1])
    assert (scores.asked, scores.redeployed, scores.rejected) == (2, 1, 1)
    assert (scores.worker_seconds, scores.bytes_redeploy, scores.megabytes_redeploy) == (5.5, 900, 9e-4)


def test_precision_counts_redeployments_after_which_the_loss_fell():
    def loss(client, tick):
        return {0: 2.0 if 10 <= tick < 14 else 0.5, 1: 1.0 if tick >= 14 else 0.5, 2: 0.5}[client]

    events = [event for c in (0, 1) for event in (Request(tick=10, client=c, job=c), Redeployment(tick=14, client=c, job=c))]
    tables = world(events, [10, 10, -1], loss=loss)
    np.testing.assert_allclose(gains(ticks=tables["ticks"], events=tables["events"]), [1.5, -0.5])
    assert score(rounds=empty_table("rounds"), **tables).precision == 0.5


def test_training_is_scored_without_serving():
    rounds = {name: np.arange(3) for name in empty_table("rounds").column_names} | {"note": ["", "", ""]}
    rounds["test_accuracy"] = np.array([0.1, 0.7, np.nan])
    empty = {name: empty_table(name) for name in ("ticks", "events", "truth")}
    scores = score(rounds=arrow_table("rounds", rounds), **empty)
    assert (scores.test_accuracy, scores.bytes_train, scores.num_ticks) == (0.7, 6, 0)
    assert np.isnan([scores.harm, scores.accuracy_before, scores.false_alarm_rate]).all()


def test_means_by_tick_skip_what_was_not_measured():
    at, mean = by_tick(np.array([0, 0, 2, 2, 3]), np.array([1.0, 3.0, np.nan, 5.0, np.nan]))
    assert (at.tolist(), mean.tolist()) == ([0, 2], [2.0, 5.0])


def test_a_realistic_run_scores_as_it_was_made(made_up_run):
    made = {policy: made_up_run(policy=policy) for policy in ("never", "alarm", "oracle")}
    scores = {name: score(**{key: t[key] for key in ("rounds", "ticks", "events", "truth")}) for name, t in made.items()}
    assert scores["never"].harm > scores["alarm"].harm > scores["oracle"].harm
    assert scores["never"].accuracy_end < 0.2 < 0.7 < scores["alarm"].accuracy_end < scores["oracle"].accuracy_end
    assert scores["never"].worker_seconds == 0
    assert scores["alarm"].precision == 1
    assert scores["alarm"].false_alarms == 6
    rows = zip(*(column(made["alarm"]["ticks"], n) for n in ("tick", "client", "statistic")), strict=True)
    change = dict(zip(*(column(made["alarm"]["truth"], n).tolist() for n in ("client", "change_at")), strict=True))
    watched = sum(1 for t, c, s in rows if not np.isnan(s) and (change[c] < 0 or t < change[c]))
    assert scores["alarm"].run_length == watched / 6
    at, accuracy = accuracy_over_time(ticks=made["never"]["ticks"], truth=made["never"]["truth"])
    assert accuracy[at < 100].mean() > 0.9 > 0.2 > accuracy[at >= 100].mean()


def test_scores_do_not_depend_on_the_order_of_rows(tables):
    rng = np.random.default_rng(0)
    shuffled = {name: t.take(rng.permutation(len(t))) for name, t in tables.items() if name != "rounds"}
    pick = ("ticks", "events", "truth")
    ordered, mixed = (score(rounds=tables["rounds"], **{k: t[k] for k in pick}) for t in (tables, shuffled))
    for name, value in vars(ordered).items():
        assert getattr(mixed, name) == pytest.approx(value, rel=1e-12), name


def test_never_is_later_than_every_tick():
    assert (column(world([], [-1])["ticks"], "tick") < NEVER).all()


def test_an_event_of_a_client_that_never_serves_is_a_false_alarm():
    assert scored([Event(tick=3, client=99, kind="alarm")], [5]).false_alarms == 1
