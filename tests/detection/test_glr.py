import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import CUSUM, Gaussian
from detection.focus import FOCuS
from detection.glr import MeanVarianceGLR, WindowGLR

INF = float("inf")


def shifting_streams(streams=8, ticks=60, seed=0):
    """Standard normal streams whose mean moves by up to 2 either way, and spread by a factor of up to 3, somewhere."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((streams, ticks))
    for row in x:
        change = rng.integers(5, ticks)
        row[change:] = rng.uniform(-2, 2) + rng.uniform(0.3, 3) * row[change:]
    return x


def history(detector, x):
    state, statistic, changed = detector.init(len(x)), np.empty_like(x), np.empty(x.shape, np.int64)
    for tick, column in enumerate(x.T):
        state = detector.step(state, column)
        statistic[:, tick], changed[:, tick] = detector.statistic(state), detector.changed_at(state)
    return statistic, changed


def best_stretch(stream, ratio, shortest, window):
    """Highest ``ratio`` of the last ``shortest .. window`` observations at every tick, at least 0, and the first observation it takes."""
    best, first = np.zeros(len(stream)), np.arange(len(stream)) + 2
    for t in range(1, len(stream) + 1):
        for m in range(shortest, min(t, window) + 1):
            value = ratio(stream[t - m : t])
            if value > best[t - 1]:
                best[t - 1], first[t - 1] = value, t - m + 1
    return best, first


def mean_ratio(side, sizes):
    """Likelihood ratio of the best mean on ``side`` with a size in ``sizes``: the parabola's peak, or the nearer end."""

    def ratio(values):
        means = []
        for sign in {"up": (1,), "down": (-1,), "both": (1, -1)}[side]:
            means.append(sign * min(max(sign * values.mean(), sizes[0]), sizes[1]))
        return max((mean * values - mean**2 / 2).sum() for mean in means)

    return ratio


@pytest.mark.parametrize("side", ["up", "down", "both"])
@pytest.mark.parametrize("sizes", [(0.0, INF), (0.5, INF), (0.0, 1.0), (0.5, 1.5), (1.0, 1.0)])
def test_a_shift_of_any_allowed_size_is_looked_for_in_every_stretch_of_the_window(side, sizes):
    x = shifting_streams()
    statistic, changed = history(WindowGLR(threshold=5.0, window=20, side=side, sizes=sizes), x)
    for row, stream in enumerate(x):
        best, first = best_stretch(stream, mean_ratio(side, sizes), 1, 20)
        assert_allclose(statistic[row], best, rtol=1e-9, atol=1e-12)
        assert_array_equal(changed[row], first)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_one_size_of_shift_is_cusum_where_its_excursions_fit_the_window(shift):
    x = np.random.default_rng(1).standard_normal((50, 200)) + np.where(np.arange(200) < 150, 0.0, shift)
    cusum = CUSUM(pre=Gaussian(0.0, 1.0), post=Gaussian(shift, 1.0), threshold=5.0)
    expected, since = history(cusum, x)
    statistic, changed = history(WindowGLR(threshold=5.0, window=200, sizes=(shift, shift)), x)
    assert_allclose(statistic, expected, rtol=1e-10, atol=1e-10)
    rising = expected > 1e-9
    # the best start is the last time the sum of increments was lowest, which is where the reflected sum was last 0
    assert_array_equal(changed[rising], since[rising])


def test_with_a_window_over_the_whole_stream_it_is_focus():
    x = shifting_streams(seed=2)
    window, focus = WindowGLR(threshold=5.0, window=60, side="both"), FOCuS(threshold=5.0, side="both")
    for first, second in zip(history(window, x), history(focus, x), strict=True):
        assert_allclose(first, second, rtol=1e-9, atol=1e-12)


def test_a_change_of_more_than_the_window_ago_is_forgotten():
    glr = WindowGLR(threshold=5.0, window=5)
    statistic, _ = history(glr, np.array([[9.0] * 3 + [-1.0] * 5]))
    assert statistic[0, 2] == pytest.approx(9.0**2 * 3 / 2)
    assert statistic[0, -1] == 0.0


def mean_variance_ratio(values):
    """Log-likelihood of the values' own mean and variance over that of 0 and 1."""
    variance = max(values.var(), 1e-12)
    own = -0.5 * (np.log(variance) + (values - values.mean()) ** 2 / variance).sum()
    return own + 0.5 * (values**2).sum() if variance > 1e-12 else 0.5 * ((values**2).sum() - len(values) * (1 + np.log(variance)))


def test_mean_and_variance_are_estimated_in_every_stretch_of_the_window():
    x = shifting_streams(seed=3)
    x[0, 30:40] = 0.5  # a constant stretch: variance 0
    statistic, changed = history(MeanVarianceGLR(threshold=5.0, window=20, shortest=4), x)
    for row, stream in enumerate(x):
        best, first = best_stretch(stream, mean_variance_ratio, 4, 20)
        assert_allclose(statistic[row], best, rtol=1e-8, atol=1e-9)
        assert_array_equal(changed[row], first)
    assert (statistic[:, :3] == 0.0).all()


@pytest.mark.parametrize("moved", [lambda x: x + 2.0, lambda x: x - 2.0, lambda x: 3.0 * x, lambda x: 0.2 * x])
def test_a_mean_or_a_variance_that_moves_either_way_is_seen(moved):
    x = np.random.default_rng(4).standard_normal((30, 90))
    x[:, 60:] = moved(x[:, 60:])
    statistic, changed = history(MeanVarianceGLR(threshold=11.0, window=50), x)
    assert (statistic[:, :60].max(axis=1) < 11.0).mean() > 0.85
    assert (statistic[:, -1] >= 11.0).mean() > 0.85
    assert abs(np.median(changed[:, -1]) - 61) <= 1


def test_the_largest_numbers_alarm():
    glr = MeanVarianceGLR(threshold=11.0, shortest=2)
    state = glr.init(2)
    for x in ([0.0, 0.0], [1e300, -1e300]):
        state = glr.step(state, x)
    assert glr.alarms(state).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowGLR(threshold=1.0, window=0), "window"),
        (lambda: WindowGLR(threshold=1.0, side="left"), "side"),
        (lambda: WindowGLR(threshold=1.0, sizes=(2.0, 1.0)), "sizes"),
        (lambda: WindowGLR(threshold=1.0, sizes=(0.0, 0.0)), "sizes"),
        (lambda: WindowGLR(threshold=1.0, sizes=(float("nan"), 1.0)), "sizes"),
        (lambda: MeanVarianceGLR(threshold=1.0, shortest=1), "shortest"),
        (lambda: MeanVarianceGLR(threshold=1.0, window=3, shortest=4), "shortest"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_vectors_are_refused():
    for glr in (WindowGLR(threshold=1.0), MeanVarianceGLR(threshold=1.0)):
        with pytest.raises(ValueError, match="one number for each stream"):
            glr.step(glr.init(2), np.zeros((2, 3)))
