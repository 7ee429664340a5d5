import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection.focus import FOCuS
from detection.states import columns, take

SIGNS = {"up": (1.0,), "down": (-1.0,), "both": (1.0, -1.0)}


def streams_with_changes(streams=16, ticks=100, mean=0.0, seed=0):
    """Standard normal streams; half of them rise or fall by up to 2 somewhere, some grow steadily: the longest hulls."""
    rng = np.random.default_rng(seed)
    x = mean + rng.standard_normal((streams, ticks))
    for row in range(streams // 2):
        x[row, rng.integers(10, ticks) :] += rng.uniform(-2, 2)
    slope = 3.0 * np.linspace(0.0, 1.0, ticks) ** 1.5
    x[-1], x[-2] = mean + slope, mean - slope
    return x


def brute_force(x, side, mean):
    """Highest ratio over all starts k < t at every tick (T,), and its best start (the latest tick where no start has a positive one)."""
    total = np.concatenate(([0.0], np.cumsum(x - (mean or 0.0))))
    best, start = [], []
    for t in range(1, len(total)):
        k = np.arange(0 if mean is not None else 1, t)
        rise = (total[t] - total[k]) / (t - k) - (0.0 if mean is not None else total[k] / k)
        weight = t - k if mean is not None else k * (t - k) / t
        ratio = np.max([np.maximum(sign * rise, 0.0) ** 2 * weight / 2 for sign in SIGNS[side]], axis=0)
        best.append(ratio.max(initial=0.0))
        start.append(k[ratio.argmax()] if ratio.max(initial=0.0) > 0 else t)
    return np.array(best), np.array(start)


def history(focus, x):
    state, statistic, changed = focus.init(len(x)), np.empty_like(x), np.empty(x.shape, np.int64)
    for tick, column in enumerate(x.T):
        state = focus.step(state, column)
        statistic[:, tick], changed[:, tick] = focus.statistic(state), focus.changed_at(state)
    return statistic, changed, state


@pytest.mark.parametrize("side", ["up", "down", "both"])
@pytest.mark.parametrize("mean", [0.0, 1.5, None])
def test_at_every_tick_of_every_stream_the_statistic_and_its_start_are_those_of_a_search_over_all_starts(side, mean):
    x = streams_with_changes(mean=mean or 0.0)
    statistic, changed, _ = history(FOCuS(threshold=5.0, side=side, mean=mean), x)
    for row, stream in enumerate(x):
        best, start = brute_force(stream, side, mean)
        assert_allclose(statistic[row], best, rtol=1e-9, atol=1e-12)
        assert_array_equal(changed[row, best > 1e-9], start[best > 1e-9] + 1)


def test_both_sides_are_the_higher_of_the_two():
    x = streams_with_changes(seed=1)
    up, down, both = (history(FOCuS(threshold=5.0, side=side), x)[0] for side in ("up", "down", "both"))
    assert_array_equal(both, np.maximum(up, down))
    assert_array_equal(history(FOCuS(threshold=5.0), -x)[0], down)


def test_a_whole_number_stream_with_ties_gives_the_exact_ratio():
    x = np.random.default_rng(2).integers(-1, 2, size=(30, 80)).astype(float)  # sums are exact, starts often tie
    statistic, _, _ = history(FOCuS(threshold=5.0, side="both"), x)
    for row, stream in enumerate(x):
        assert_allclose(statistic[row], brute_force(stream, "both", 0.0)[0], rtol=1e-14)


def test_an_unknown_mean_does_not_matter():
    x = streams_with_changes(seed=3)
    focus = FOCuS(threshold=5.0, mean=None, side="both")
    assert_allclose(history(focus, x + 1000.0)[0], history(focus, x)[0], rtol=1e-6, atol=1e-8)


def test_no_start_is_better_than_the_next_observation_where_nothing_speaks_for_a_change():
    focus = FOCuS(threshold=1.0)
    state = focus.step(focus.step(focus.init(1), [-1.0]), [-2.0])
    assert focus.statistic(state) == 0.0
    assert focus.changed_at(state) == 3


@pytest.mark.parametrize(("mean", "expected"), [(0.0, 0.5), (None, 1.0)])
def test_a_quiet_stream_keeps_vertices_by_the_logarithm_of_its_length(mean, expected):
    focus, rng, ticks, streams = FOCuS(threshold=50.0, mean=mean), np.random.default_rng(4), 1000, 200
    state = focus.init(streams)
    for _ in range(ticks):
        state = focus.step(state, rng.standard_normal(streams))
    # faces of the hull of a random walk: sum of 1/k, half of them rising (Sparre Andersen), and the end point
    vertices = expected * (np.log(ticks) + np.euler_gamma) + 1.0
    assert state.sizes.mean() == pytest.approx(vertices, abs=0.4)
    assert state.sums.shape[-1] <= 32


def test_slots_double_when_a_hull_fills_them_and_nothing_is_lost():
    x = np.vstack((np.linspace(0.0, 1.0, 100), np.zeros(100)))  # a steady rise: every tick is a vertex
    focus = FOCuS(threshold=50.0)
    statistic, _, state = history(focus, x)
    assert state.sums.shape == (2, 1, 128)
    assert_array_equal(state.sizes[:, 0], [100, 1])
    assert_allclose(statistic[0], brute_force(x[0], "up", 0.0)[0], rtol=1e-12)
    assert np.isinf(state.sums[1, 0, 1:]).all()


def test_a_restarted_stream_is_fresh_among_streams_with_long_hulls():
    focus, rows = FOCuS(threshold=50.0, side="both"), np.array([True, False])
    _, _, state = history(focus, np.tile(np.linspace(0.0, 1.0, 30), (2, 1)))
    restarted, fresh = focus.restart(state, rows), focus.init(1)
    for x in (0.5, -1.0, 2.0):
        restarted, fresh = focus.step(restarted, [x, x]), focus.step(fresh, [x])
    assert_array_equal(focus.statistic(restarted)[:1], focus.statistic(fresh))
    assert_array_equal(focus.changed_at(restarted)[:1], focus.changed_at(fresh))


def test_one_stream_of_a_wide_state_can_be_taken_out_and_continued():
    x = streams_with_changes(seed=5)
    focus = FOCuS(threshold=50.0, side="both")
    _, _, state = history(focus, x[:, :60])
    alone = take(state, slice(3, 4))
    for column in x[:, 60:].T:
        state, alone = focus.step(state, column), focus.step(alone, column[3:4])
    assert_array_equal(focus.statistic(alone), focus.statistic(state)[3:4])
    assert all(len(column) == 1 for _, column in columns(alone))


@pytest.mark.parametrize("setting", [{"side": "left"}, {"mean": np.nan}, {"threshold": 0.0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        FOCuS(**{"threshold": 5.0} | setting)
