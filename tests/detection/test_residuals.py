import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from detection import CUSUM, Gaussian, NormalScores, RunLengths, Singleton
from detection.autocorrelation import pooled_autocorrelation
from detection.residuals import BatchMeans, FittedResidual, Residual, block_means

KNOWN = CUSUM.fit(pre=Singleton(Gaussian(0.0, 1.0)), post=Singleton(Gaussian(1.0, 1.0)), arl=1000, clip=None)


def autoregressive(rng, streams, values, phi, mean=0.0):
    """Stationary, of variance 1."""
    phi = np.broadcast_to(np.asarray(phi, dtype=float), (streams,))
    noise = rng.standard_normal((streams, values))
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0]
    for tick in range(1, values):
        x[:, tick] = phi * x[:, tick - 1] + np.sqrt(1 - phi**2) * noise[:, tick]
    return x + mean


def average(x):
    return RunLengths.of(KNOWN.increment(x)).average(KNOWN.threshold)


@pytest.mark.parametrize(("phi", "raw"), [(0.0, 999), (0.1, 543), (0.3, 196), (0.5, 111)])
def test_dependence_multiplies_false_alarms_and_residuals_undo_it(phi, raw):
    x = autoregressive(np.random.default_rng(0), 3000, 2000, phi)
    known = FittedResidual(phi=np.full(3000, phi), centre=np.zeros(3000))
    assert average(x) == pytest.approx(raw, rel=0.07)
    assert average(known.transform(x) / np.sqrt(1 - phi**2)) == pytest.approx(1000, rel=0.07)


def test_residuals_with_fitted_coefficients_and_scales_keep_the_run_length_near_the_promise():
    rng = np.random.default_rng(1)
    phi = np.clip(rng.normal(0.4, 0.1, 1000), 0, 0.8)
    x = autoregressive(rng, 1000, 1500, phi, mean=3.0)
    fitted = Residual().fit(x[:, :300])
    residuals = fitted.transform(x)
    u = NormalScores(scale="identity").fit(residuals[:, :300]).transform(residuals[:, 300:])
    known = average((x[:, 300:] - x[:, :300].mean(axis=1, keepdims=True)) / x[:, :300].std(axis=1, keepdims=True))
    assert known < 250
    assert 750 < average(u) < 1250


def test_residuals_are_gaussian_forecast_errors_across_gaps_and_from_the_first_value():
    phi, rng = 0.7, np.random.default_rng(2)
    seen = np.array([0, 1, 4, 5, 9])  # the ticks observed
    x = rng.standard_normal(5)
    stream = np.full((1, 10), np.nan)
    stream[0, seen] = 2.0 + x
    residuals = FittedResidual(phi=np.array([phi]), centre=np.array([2.0])).transform(stream)[0]
    covariance = phi ** np.abs(seen[:, None] - seen[None, :])
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), x)  # the same forecasts, by a dense factorisation
    assert_allclose(residuals[seen], np.sqrt(1 - phi**2) * whitened, rtol=1e-12)
    assert_array_equal(np.isnan(residuals), ~np.isin(np.arange(10), seen))


def test_residuals_of_missing_ticks_are_independent_and_of_one_law():
    rng = np.random.default_rng(3)
    x = autoregressive(rng, 4000, 60, 0.6)
    observed = rng.random(x.shape) < 0.6
    residuals = FittedResidual(phi=np.full(4000, 0.6), centre=np.zeros(4000)).transform(np.where(observed, x, np.nan))
    first = observed.argmax(axis=1)
    assert stats.kstest(residuals[np.arange(4000), first] / 0.8, "norm").pvalue > 1e-3
    assert stats.kstest(residuals[observed][::7] / 0.8, "norm").pvalue > 1e-3
    assert abs(pooled_autocorrelation(residuals, observed).value) < 0.01


@pytest.mark.parametrize("spread", [0.0, 0.15])
def test_coefficients_are_nearer_the_truth_than_each_streams_own(spread):
    rng = np.random.default_rng(4)
    truth = np.clip(rng.normal(0.4, spread, 2000), 0.0, 0.9)
    x = autoregressive(rng, 2000, 60, truth)
    away = x - x.mean(axis=1, keepdims=True)
    own = np.clip((away[:, 1:] * away[:, :-1]).sum(axis=1) / (away**2).sum(axis=1), 0, 0.95)
    phi = Residual().fit(x).phi
    assert phi.mean() == pytest.approx(truth.mean(), abs=0.01)  # own is low by (1 + 4 phi) / n = 0.04
    assert np.square(phi - truth).mean() < 0.7 * np.square(own - truth).mean()
    assert phi.std() == pytest.approx(spread, abs=0.05)


def test_coefficients_stay_in_bounds_and_a_constant_stream_takes_the_fleets():
    rng = np.random.default_rng(5)
    walk = np.cumsum(rng.standard_normal((20, 400)), axis=1)
    assert (Residual().fit(walk).phi == 0.95).all()
    assert (Residual(highest=0.5).fit(walk).phi == 0.5).all()
    alternating = autoregressive(rng, 20, 400, -0.6)
    assert (Residual().fit(alternating).phi == 0.0).all()
    mixed = autoregressive(rng, 21, 400, 0.5)
    mixed[20] = 7.0
    fitted = Residual().fit(mixed)
    assert fitted.phi[20] == pytest.approx(fitted.phi[:20].mean(), abs=0.02)
    assert fitted.centre[20] == 7.0
    assert 0.3 < Residual().fit(mixed[:1]).phi[0] < 0.7


def test_a_shift_of_dependent_streams_keeps_the_stated_part_of_its_size():
    phi, delta = 0.5, 2.0
    x = autoregressive(np.random.default_rng(6), 5000, 40, phi)
    x[:, 20:] += delta
    u = FittedResidual(phi=np.full(5000, phi), centre=np.zeros(5000)).transform(x) / np.sqrt(1 - phi**2)
    assert u[:, 21:].mean() == pytest.approx(delta * np.sqrt((1 - phi) / (1 + phi)), abs=0.02)


def test_streaming_equals_the_whole_and_idle_streams_keep_their_value_while_time_passes():
    rng = np.random.default_rng(7)
    x = autoregressive(rng, 4, 30, 0.5)
    fitted = Residual().fit(x)
    state = fitted.init()
    for tick, column in enumerate(x.T):
        before = state
        state, r = fitted.step(state, column)
        assert_array_equal(r, fitted.transform(x)[:, tick])
    idle = np.array([True, False, True, True])
    after, r = fitted.step(state, np.array([1.0, np.nan, 1.0, 1.0]), idle)
    assert after.last[1] == state.last[1]
    assert_array_equal(after.ago, [1, 2, 1, 1])
    assert np.isnan(r[1])
    assert before.ago is not state.ago


def test_batch_means_are_the_means_of_the_values_seen():
    rng = np.random.default_rng(8)
    x, active = rng.standard_normal((50, 6)), rng.random((50, 6)) < 0.7
    means, state, found = BatchMeans(size=4), BatchMeans(size=4).init(6), [[] for _ in range(6)]
    for values, on in zip(x, active, strict=True):
        state, mean, ready = means.step(state, np.where(on, values, np.nan), on)
        for stream in np.flatnonzero(ready):
            found[stream].append(mean[stream])
    for stream in range(6):
        kept = x[active[:, stream], stream]
        whole = len(kept) // 4
        assert_allclose(found[stream], kept[: 4 * whole].reshape(whole, 4).mean(axis=1), rtol=1e-12)


def test_block_means_leave_little_dependence_and_skip_blocks_hardly_seen():
    x = autoregressive(np.random.default_rng(9), 300, 1600, 0.6)
    assert pooled_autocorrelation(block_means(x, 16)).value < 0.1
    holes = np.array([[1.0, np.nan, 3.0, np.nan, np.nan, 5.0]])
    assert_array_equal(block_means(holes, 3), [[2.0, np.nan]])


def _step(x, active=None):
    return FittedResidual(phi=np.full(3, 0.5), centre=np.zeros(3)).step(
        FittedResidual(phi=np.full(3, 0.5), centre=np.zeros(3)).init(), x, active
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Residual(highest=1.0), "highest must lie between 0 and 1"),
        (lambda: Residual().fit(np.ones((3, 20))), "not all equal"),
        (lambda: Residual().fit(np.random.default_rng(0).random((3, 5))), "at least 8"),
        (lambda: Residual().fit(np.ones(3)), r"\(streams, values\)"),
        (lambda: Residual().fit(np.full((3, 20), np.nan)), "60 observed values are nan"),
        (lambda: _step([1.0, np.nan, 1.0]), "first is stream 1"),
        (lambda: _step([1.0, 1.0, np.inf]), "first is stream 2"),
        (lambda: _step([1.0, 1.0]), "3 streams"),
        (lambda: FittedResidual(phi=np.full(3, 0.5), centre=np.zeros(3)).transform(np.ones((2, 4))), "3 rows"),
        (lambda: BatchMeans(size=0), "size must be at least 1"),
        (lambda: BatchMeans(size=2).init(0), "streams must be at least 1"),
        (lambda: BatchMeans(size=2).step(BatchMeans(size=2).init(2), [1.0, np.nan]), "first is stream 1"),
    ],
)
def test_bad_streams_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
