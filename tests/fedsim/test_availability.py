"""Who can take part, against brute force and counts; draws whose cost does not grow with the fleet."""

import time

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import chisquare

from fedsim.availability import Always, Diurnal, Independent, Trace, draw_cohort
from fedsim.fleet import Fleet

HOUR = 3600.0


def fleet_of(num, **columns):
    ones = dict.fromkeys(("flops", "memory", "up", "down"), np.full(num, 1e9))
    return Fleet.from_table({**ones, **columns})


def everyone(fleet):
    return np.arange(len(fleet))


def ask(law, fleet, clock=0.0, round=0, attempt=0):
    return law.present(fleet, everyone(fleet), clock, round, 0, attempt)


def test_independent_clients_are_there_as_often_as_their_column_says_and_each_for_itself():
    fleet = fleet_of(50, availability=np.linspace(0.02, 1.0, 50))
    there = np.array([ask(Independent(), fleet, round=r) for r in range(2000)])
    assert_allclose(there.mean(0), fleet.availability, atol=0.05)
    few = np.array([3, 17, 40])
    assert_array_equal(Independent().present(fleet, few, 0.0, 7, 0, 0), there[7][few])


def test_a_day_has_its_peak_and_its_floor_by_the_clients_own_clock():
    fleet = fleet_of(4, region_u=np.array([0.0, 0.25, 0.5, 0.75]), region_v=np.zeros(4))
    law = Diurnal(peak_hour=2, width_hours=2, floor=0.1)
    for hour, nearest in ((2.0, 0), (20.0, 1), (14.0, 2), (8.0, 3)):
        chance = law.chance(fleet, everyone(fleet), hour * HOUR, 0)
        assert np.argmax(chance) == nearest
        assert chance[nearest] == pytest.approx(1.0)
        assert chance[(nearest + 2) % 4] == pytest.approx(0.1, abs=1e-6)
    assert_allclose(law.chance(fleet, everyone(fleet), 5 * HOUR, 0), law.chance(fleet, everyone(fleet), 53 * HOUR, 0))


def brute_force(rows, client, t):
    return any(c == client and a <= t < b for c, a, b in rows)


@pytest.mark.parametrize("period", [None, 500.0])
def test_a_trace_says_what_its_rows_say(period):
    rng = np.random.default_rng(0)
    rows = []
    for client in sorted(rng.choice(20, 15, replace=False).tolist()):
        cuts = np.unique(rng.integers(0, 500, 8))
        rows += [(client, float(a), float(b)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    who, start, end = map(np.array, zip(*rows, strict=True))
    trace, fleet = Trace(who=who, start=start, end=end, period_seconds=period), fleet_of(20)
    for t in [0.0, 1.0, *rng.uniform(0, 500, 60), *start[:5], *end[:5]]:
        expected = [brute_force(rows, c, t % period if period else t) for c in range(20)]
        assert_array_equal(ask(trace, fleet, clock=t), expected)
        if period:
            assert_array_equal(ask(trace, fleet, clock=t + 7 * period), expected)


def test_a_trace_of_device_classes_moves_whole_classes():
    fleet = fleet_of(6, device=np.array(["a", "b", "a", "c", "b", "a"]))
    trace = Trace(who=[0, 1], start=[0, 10], end=[5, 20], by="device")
    assert_array_equal(ask(trace, fleet, clock=3), [1, 0, 1, 0, 0, 1])
    assert_array_equal(ask(trace, fleet, clock=12), [0, 1, 0, 0, 1, 0])


def test_a_trace_is_read_from_a_file(tmp_path):
    (tmp_path / "t.csv").write_text("client,start,end\n0,0,10\n2,5,6\n")
    trace = Trace.read(tmp_path / "t.csv")
    assert_array_equal(ask(trace, fleet_of(3), clock=5.5), [1, 0, 1])
    (tmp_path / "d.csv").write_text("device,start,end\nb,0,10\n")
    fleet = fleet_of(2, device=np.array(["a", "b"]))
    assert_array_equal(ask(Trace.read(tmp_path / "d.csv", fleet), fleet, clock=1), [0, 1])
    with pytest.raises(ValueError, match="give the fleet"):
        Trace.read(tmp_path / "d.csv")
    with pytest.raises(ValueError, match=r"\['b'\]"):
        Trace.read(tmp_path / "d.csv", fleet_of(2, device=np.array(["a", "c"])))
    (tmp_path / "bad.csv").write_text("client,begin\n0,0\n")
    with pytest.raises(ValueError, match="columns start, end"):
        Trace.read(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (([0, 0], [0, 4], [5, 9]), "row 1 .* without overlap"),
        (([1, 0], [0, 0], [1, 1]), "row 1 .* by client"),
        (([0], [-1], [1]), "row 0 .* at least 0 seconds"),
        (([0], [1], [1]), "row 0 .* after start"),
        (([0], [1], [np.nan]), "row 0 .* finite"),
        (([-1], [0], [1]), "row 0 .* at least 0"),
        (([], [], []), "needs rows"),
    ],
)
def test_a_bad_row_of_a_trace_is_named(rows, match):
    with pytest.raises(ValueError, match=match):
        Trace(who=rows[0], start=rows[1], end=rows[2])


def test_the_clock_jumps_to_the_next_interval_or_says_that_there_is_none():
    trace, fleet = Trace(who=[0, 0], start=[100, 300], end=[200, 310]), fleet_of(1)
    options = {"round": 0, "seed": 0}
    assert draw_cohort(trace, fleet, everyone(fleet), 1, clock=0.0, **options)[1] == 100.0
    assert draw_cohort(trace, fleet, everyone(fleet), 1, clock=250.0, **options)[1] == 300.0
    with pytest.raises(ValueError, match="lengthen the trace"):
        draw_cohort(trace, fleet, everyone(fleet), 1, clock=400.0, **options)
    again = Trace(who=[0, 0], start=[100, 300], end=[200, 310], period_seconds=400)
    assert draw_cohort(again, fleet, everyone(fleet), 1, clock=390.0, **options)[1] == 500.0


def test_a_trace_of_years_and_millions_is_exact_to_the_last_bit():
    starts = 1e9 + np.array([0.0, 1e-4])
    trace, fleet = Trace(who=[999_999, 999_999], start=starts, end=[1e9 + 5e-5, 2e9]), fleet_of(1_000_000)
    for clock, expected in ((np.nextafter(starts[0], 0), False), (starts[0], True), (1e9 + 7e-5, False), (starts[1], True)):
        assert bool(trace.present(fleet, np.array([999_999]), clock, 0, 0, 0)[0]) == expected


@pytest.mark.parametrize("clock", [1e9 + 0.1, 3e10 + 1 / 3, 7.7e12])
def test_the_clock_moves_on_where_the_next_interval_is_nearer_than_a_float_can_say(clock):
    now = clock % 0.7
    trace, fleet = Trace(who=[0], start=[min(0.65, now + 1e-12)], end=[0.7], period_seconds=0.7), fleet_of(1)
    found = draw_cohort(trace, fleet, everyone(fleet), 1, clock=clock, round=0, seed=0)[1]
    assert clock <= found <= clock + 1.0


@pytest.mark.parametrize("num", [40, 6000])
def test_a_cohort_is_uniform_over_those_present(num):
    """6,000 clients are more than are asked at first."""
    fleet = fleet_of(num)
    start = np.where(np.arange(num) % 2 == 0, 0.0, 50.0)
    trace = Trace(who=np.arange(num), start=start, end=start + 10)
    counts = np.zeros(num)
    rounds = 400
    for r in range(rounds):
        clients, begins = draw_cohort(trace, fleet, everyone(fleet), 8, clock=1.0, round=r, seed=3)
        assert begins == 1.0
        assert len(clients) == 8
        assert (np.diff(clients) > 0).all()
        counts[clients] += 1
    assert not counts[1::2].any()
    bins = counts[::2].reshape(20, -1).sum(1)
    assert chisquare(bins).pvalue > 1e-3


def test_a_large_fleet_that_is_mostly_away_is_asked_whole():
    fleet = fleet_of(20_000)
    trace = Trace(who=[17, 19_999], start=[0, 0], end=[1, 1])
    clients, _ = draw_cohort(trace, fleet, everyone(fleet), 8, clock=0.5, round=0, seed=0)
    assert_array_equal(clients, [17, 19_999])


def test_a_draw_costs_what_its_cohort_costs():
    def seconds(num):
        fleet = fleet_of(num, availability=np.full(num, 0.8))
        holders = everyone(fleet)
        draw_cohort(Independent(), fleet, holders, 200, clock=0.0, round=0, seed=0)
        start = time.perf_counter()
        for r in range(10):
            draw_cohort(Independent(), fleet, holders, 200, clock=0.0, round=r, seed=0)
        return time.perf_counter() - start

    assert min(seconds(1_000_000) for _ in range(3)) < 5 * min(seconds(10_000) for _ in range(3))


@pytest.mark.parametrize(
    ("law", "match"),
    [
        (lambda: Diurnal(peak_hour=24), "peak_hour"),
        (lambda: Diurnal(width_hours=0), "width_hours"),
        (lambda: Diurnal(floor=2), "floor"),
        (lambda: Independent(retry_seconds=0), "retry_seconds"),
        (lambda: Trace(who=[0], start=[0], end=[1], by="x"), "by"),
        (lambda: Trace(who=[0], start=[0], end=[9], period_seconds=5), "period"),
    ],
)
def test_bad_settings_are_refused_by_name(law, match):
    with pytest.raises(ValueError, match=match):
        law()


def test_always_is_always():
    assert ask(Always(), fleet_of(5, availability=np.full(5, 0.01))).all()
