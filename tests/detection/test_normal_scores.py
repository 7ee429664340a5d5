import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import stats
from scipy.interpolate import RectBivariateSpline

from detection import (
    CUSUM,
    Gaussian,
    GaussianBox,
    NormalScores,
    RobustScoreCUSUM,
    RunLengths,
    Singleton,
    confidence_box,
    exact_run_length,
    likelihood_increment,
)
from detection.normal_scores import _inverse_trigamma

NULL = Gaussian(0.0, 1.0)


def gamma_losses(rng, clients, values, scales=None):
    scales = np.ones(clients) if scales is None else scales
    return scales[:, None] * rng.gamma(0.7, 1.0, (clients, values))


def lognormal_losses(rng, clients, values, scales=None):
    scales = np.ones(clients) if scales is None else scales
    return scales[:, None] * rng.lognormal(0.0, 1.0, (clients, values))


def mixture_losses(rng, clients, values, scales=None):
    scales = np.ones(clients) if scales is None else scales
    hard = rng.random((clients, values)) < 0.15
    return scales[:, None] * np.where(hard, rng.gamma(4.0, 0.6, (clients, values)), rng.gamma(1.5, 0.1, (clients, values)))


@pytest.mark.parametrize("losses", [gamma_losses, lognormal_losses, mixture_losses])
def test_losses_of_any_scale_and_shape_become_standard_normal(losses):
    rng = np.random.default_rng(0)
    scales = rng.lognormal(0.0, 1.0, 200)
    fitted = NormalScores().fit(losses(rng, 200, 300, scales))
    u = fitted.transform(losses(rng, 200, 100, scales))
    assert stats.kstest(u.ravel(), "norm").statistic < 0.01
    assert np.abs(u.mean(axis=1)).max() < 0.6
    assert u.std() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("losses", "raw_below"), [(gamma_losses, 350), (lognormal_losses, 300)])
def test_normal_scores_keep_the_run_length_that_raw_z_scores_break(losses, raw_below):
    rng, clients = np.random.default_rng(1), 400
    detector = CUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(1.0, 1.0)), arl=1000, clip=None)
    calibration, stream = losses(rng, clients, 100), losses(rng, clients, 1000)
    increment = likelihood_increment(NULL, Gaussian(1.0, 1.0))
    z = (stream - calibration.mean(axis=1, keepdims=True)) / calibration.std(axis=1, ddof=1, keepdims=True)
    u = NormalScores().fit(calibration).transform(stream)
    assert RunLengths.of(increment(z)).average(detector.threshold) < raw_below
    assert 700 < RunLengths.of(increment(u)).average(detector.threshold) < 2000


@pytest.mark.parametrize(
    ("losses", "raw", "logs", "pooled"),
    [(gamma_losses, 227, 8100, 1430), (lognormal_losses, 198, 1250, 1010), (mixture_losses, 220, 950, 1050)],
)
def test_run_lengths_of_raw_logarithmic_and_normal_scores_at_the_threshold_for_one_in_a_thousand(losses, raw, logs, pooled):
    rng, clients = np.random.default_rng(18), 600
    known = CUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(1.0, 1.0)), arl=1000, clip=None)
    calibration, stream = losses(rng, clients, 100), losses(rng, clients, 3000)

    def average(x):
        return RunLengths.of(known.increment(x)).average(known.threshold)

    def z_scores(own, new):
        return (new - own.mean(axis=1, keepdims=True)) / own.std(axis=1, ddof=1, keepdims=True)

    assert average(z_scores(calibration, stream)) == pytest.approx(raw, rel=0.3)
    assert average(z_scores(np.log(calibration), np.log(stream))) == pytest.approx(logs, rel=0.3)
    assert average(NormalScores().fit(calibration).transform(stream)) == pytest.approx(pooled, rel=0.2)


@pytest.mark.parametrize(("losses", "delay"), [(gamma_losses, 26), (lognormal_losses, 20), (mixture_losses, 26)])
def test_delays_when_losses_double(losses, delay):
    rng, clients = np.random.default_rng(19), 600
    known = CUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(1.0, 1.0)), arl=1000, clip=4.0)
    u = NormalScores().fit(losses(rng, clients, 100)).transform(2 * losses(rng, clients, 1500))
    assert RunLengths.of(known.increment(u)).average(known.threshold) == pytest.approx(delay, abs=4)


def log_run_lengths(detector, n, mean, variance):
    """Of streams standardised by ``n`` values: exact on a grid of laws, interpolated."""
    means = np.linspace(-4.3, 4.3, 9) / np.sqrt(n)
    logs = np.linspace(-3.9, 5.5, 9) * np.sqrt(2 / n)
    grid = [[exact_run_length(detector.increment, Gaussian(m, np.exp(v)), detector.threshold, states=100) for v in logs] for m in means]
    return RectBivariateSpline(means, logs, np.log(np.minimum(grid, 1e12))).ev(mean, np.log(variance))


@pytest.mark.parametrize(("n", "broken", "delay"), [(30, 0.379, 26.2), (100, 0.264, 17.1), (300, 0.129, 13.9), (1000, 0.019, 12.2)])
def test_little_calibration_breaks_the_promise_of_a_known_law_and_a_confidence_set_keeps_it(n, broken, delay):
    rng = np.random.default_rng(20)
    location, square = rng.standard_normal(20_000) / np.sqrt(n), rng.chisquare(n - 1, 20_000) / (n - 1)
    mean, variance = -location / np.sqrt(square), 1 / square  # law of a stream standardised by its own n values
    known = CUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(1.0, 1.0)), arl=1000, clip=None)
    assert np.mean(log_run_lengths(known, n, mean, variance) < np.log(500)) == pytest.approx(broken, abs=0.015)
    pre = confidence_box(n=n)
    post = GaussianBox(mean=(1.0, 4.0), variance=(1.0, max(1.5, pre.variance[1])))
    robust = RobustScoreCUSUM.fit(pre=pre, post=post, arl=1000, clip=None)
    assert np.mean(log_run_lengths(robust, n, mean, variance) < np.log(1000)) < 0.05
    assert exact_run_length(robust.increment, Gaussian(1.0, 1.0), robust.threshold) == pytest.approx(delay, abs=0.2)


def test_doubled_losses_are_noticed_about_as_fast_as_known():
    rng, clients = np.random.default_rng(2), 400
    detector = CUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(1.0, 1.0)), arl=1000, clip=4.0)
    u = NormalScores().fit(gamma_losses(rng, clients, 100)).transform(2 * gamma_losses(rng, clients, 600))
    assert RunLengths.of(detector.increment(u)).average(detector.threshold) == pytest.approx(30, abs=6)


def test_scores_are_the_mid_ranks_among_pooled_residuals():
    rng = np.random.default_rng(3)
    losses = rng.lognormal(size=(5, 40))
    fitted = NormalScores().fit(losses)
    new = rng.lognormal(size=5)
    r = (np.log(new + fitted.floor) - fitted.location) / fitted.deviation
    rank = np.array([(fitted.pool < value).sum() + 0.5 * (fitted.pool == value).sum() for value in r])
    np.testing.assert_allclose(fitted.transform(new), stats.norm.ppf((rank + 0.5) / 201), rtol=1e-12)
    assert fitted.floor == losses.min() / 2


def test_zero_losses_have_a_score_and_broken_models_the_top_one():
    rng = np.random.default_rng(4)
    losses = rng.exponential(size=(20, 300))
    losses[:, :3] = 0.0
    fitted = NormalScores(clip=3.0).fit(losses)
    u = fitted.transform(np.r_[0.0, np.inf, 1e9, np.nan, np.ones(16)])
    assert u[0] < -1.5
    assert_array_equal(u[1:3], [3.0, 3.0])
    assert np.isnan(u[3])


def test_locations_are_shrunk_by_the_ratio_of_variances_and_less_with_more_values():
    rng = np.random.default_rng(5)
    truth = rng.normal(0.0, 0.3, 1000)
    y = truth[:, None] + rng.standard_normal((1000, 20))
    fitted = NormalScores(scale="identity").fit(y)
    plain = y.mean(axis=1)
    assert fitted.prior.strength == pytest.approx(1 / truth.var(), rel=0.25)
    np.testing.assert_allclose(
        fitted.location, (20 * plain + fitted.prior.strength * plain.mean()) / (20 + fitted.prior.strength), rtol=1e-10
    )
    assert np.square(fitted.location - truth).mean() < 0.8 * np.square(plain - truth).mean()


def test_clients_that_do_not_differ_share_the_pool():
    rng = np.random.default_rng(6)
    y = rng.standard_normal((6, 50))
    y -= y.mean(axis=1, keepdims=True)
    y /= y.std(axis=1, ddof=1, keepdims=True)
    fitted = NormalScores(scale="identity").fit(y)
    np.testing.assert_allclose(fitted.location, 0.0, atol=1e-12)
    assert len(set(fitted.deviation)) == 1
    assert np.isinf(fitted.prior.strength)
    assert np.isinf(fitted.prior.degrees)


def test_variances_are_shrunk_by_their_estimated_prior():
    rng, degrees = np.random.default_rng(7), 10.0
    variances = degrees / rng.chisquare(degrees, 3000)
    y = np.sqrt(variances)[:, None] * rng.standard_normal((3000, 8))
    fitted = NormalScores(scale="identity").fit(y)
    plain = y.var(axis=1, ddof=1)
    assert fitted.prior.degrees == pytest.approx(degrees, rel=0.2)
    assert fitted.prior.variance == pytest.approx(1.0, rel=0.05)
    expected = (fitted.prior.degrees * fitted.prior.variance + 7 * plain) / (fitted.prior.degrees + 7)
    np.testing.assert_allclose(fitted.deviation**2, expected, rtol=1e-10)


@pytest.mark.parametrize("value", [1e-4, 0.03, 1.0, 40.0, 1e4])
def test_the_inverse_of_trigamma_inverts_it(value):
    from scipy.special import polygamma

    assert polygamma(1, _inverse_trigamma(value)) == pytest.approx(value, rel=1e-9)


def test_a_constant_client_takes_the_fleets_scale():
    rng = np.random.default_rng(8)
    losses = rng.lognormal(size=(30, 50))
    losses[4] = 1.3
    fitted = NormalScores().fit(losses)
    assert 0.3 < fitted.deviation[4] < 1.5
    assert np.isfinite(fitted.transform(np.ones(30))).all()


def test_refitting_some_clients_leaves_the_bits_of_all_others():
    rng = np.random.default_rng(9)
    fitted = NormalScores().fit(rng.lognormal(size=(10, 100)))
    rows = np.isin(np.arange(10), [2, 7])
    before = fitted.location.copy()
    again = fitted.refit(rows, np.exp(1.0 + 0.5 * rng.standard_normal((2, 12))))
    assert_array_equal(fitted.location, before)
    for name in ("location", "deviation", "counts"):
        assert_array_equal(getattr(again, name)[~rows], getattr(fitted, name)[~rows])
    assert again.pool is fitted.pool
    assert (again.location[rows] > fitted.location[rows] + 0.1).all()
    assert_array_equal(again.counts[rows], [12, 12])
    assert_array_equal(again.sparse, rows)


def test_refitting_clients_that_agree_with_the_fleet_on_their_calibration_changes_nothing():
    losses = np.random.default_rng(10).lognormal(size=(10, 100))
    fitted = NormalScores().fit(losses)
    again = fitted.refit(np.ones(10, dtype=bool), losses)
    agrees = np.abs(np.log(losses + fitted.floor).mean(axis=1) - fitted.prior.mean) < 0.05
    assert agrees.sum() >= 3
    np.testing.assert_allclose(again.location[agrees], fitted.location[agrees], rtol=1e-12)
    assert np.isclose(again.deviation, fitted.deviation, rtol=1e-12).sum() >= 8


def test_a_client_that_has_left_the_fleets_law_is_believed():
    rng = np.random.default_rng(16)
    y = rng.standard_normal((50, 100))
    fitted = NormalScores(scale="identity").fit(y)
    new = np.stack([3.0 + 0.3 * rng.standard_normal(20), 0.2 * rng.standard_normal(20)])
    again = fitted.refit(np.arange(50) < 2, new)
    assert again.location[0] == pytest.approx(new[0].mean(), abs=0.03)
    assert abs(again.location[1] - fitted.prior.mean) <= abs(new[1].mean() - fitted.prior.mean)
    assert (again.deviation[:2] < 0.6).all()
    assert (again.deviation[:2] > 0.3).all()


def test_a_refitted_client_with_constant_or_no_values_takes_the_fleets_scale():
    fitted = NormalScores().fit(np.random.default_rng(17).lognormal(size=(9, 60)))
    again = fitted.refit(np.arange(9) < 2, np.ones((2, 10)), np.arange(20).reshape(2, 10) < 10)
    assert again.deviation[1] == np.sqrt(fitted.prior.variance)
    assert again.location[1] == fitted.prior.mean
    assert again.deviation[0] > 0.5


def test_unobserved_values_are_never_read():
    rng = np.random.default_rng(11)
    losses = rng.lognormal(size=(12, 60))
    observed = rng.random((12, 60)) < 0.7
    observed[5] = False
    hidden = np.where(observed, losses, np.nan)
    fitted, reference = NormalScores().fit(hidden, observed), NormalScores().fit(np.where(observed, losses, 7.0), observed)
    assert_array_equal(fitted.location, reference.location)
    assert fitted.location[5] == fitted.prior.mean
    assert fitted.deviation[5] == np.sqrt(fitted.prior.variance)
    assert fitted.sparse[5]


def test_outliers_move_robust_scores_little_and_are_counted():
    rng = np.random.default_rng(12)
    clean = rng.lognormal(size=(40, 100))
    dirty = clean.copy()
    dirty[0, :15] = 1e6

    def moved(scores):
        return abs(scores.fit(dirty).location[0] - scores.fit(clean).location[0])

    assert moved(NormalScores(robust=True)) < 0.35
    assert moved(NormalScores()) > 1.0
    fitted = NormalScores(robust=True).fit(dirty)
    assert fitted.down_weighted[0] >= 15
    assert fitted.down_weighted[0] > NormalScores(robust=True).fit(clean).down_weighted[0]


def test_huge_pools_are_thinned_without_moving_the_scores():
    rng = np.random.default_rng(13)
    fitted = NormalScores().fit(rng.lognormal(size=(1000, 200)))
    assert len(fitted.pool) == 2**16
    assert fitted.transform(np.full(1000, 1e30)).max() == 4.0
    u = fitted.transform(rng.lognormal(size=(1000, 50)))
    assert stats.kstest(u.ravel(), "norm").statistic < 0.01


def test_a_single_client_is_its_own_fleet():
    losses = np.random.default_rng(14).lognormal(size=(1, 200))
    u = NormalScores().fit(losses).transform(losses)
    assert u.mean() == pytest.approx(0.0, abs=1e-9)
    assert u.std() == pytest.approx(1.0, abs=0.03)


def _losses(change=None):
    losses = np.random.default_rng(0).lognormal(size=(5, 40))
    if change is not None:
        losses[3, 2] = change
    return losses


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: NormalScores().fit(_losses(np.nan)), "1 calibration losses are nan or infinite, the first in row 3"),
        (lambda: NormalScores().fit(_losses(np.inf)), "nan or infinite"),
        (lambda: NormalScores().fit(_losses(-1.0)), r"NormalScores\(scale='identity'\).*row 3"),
        (lambda: NormalScores().fit(np.ones((5, 40))), "constant"),
        (lambda: NormalScores().fit(np.zeros((5, 40))), "every calibration loss is 0"),
        (lambda: NormalScores().fit(np.random.default_rng(0).integers(0, 2, (5, 40))), "only 10? distinct values|distinct values"),
        (lambda: NormalScores().fit(np.ones(5)), r"\(clients, values\)"),
        (lambda: NormalScores().fit(_losses(), np.ones((5, 39), dtype=bool)), "shape of losses"),
        (lambda: NormalScores(clip=0.0), "clip must be positive"),
        (lambda: NormalScores(scale="sqrt"), "scale must be one of"),
        (lambda: NormalScores(min_calibration=1), "min_calibration"),
        (lambda: NormalScores().fit(_losses()).transform(np.ones(4)), "5 rows"),
        (lambda: NormalScores().fit(_losses()).transform(np.r_[np.ones(4), -1.0]), "negative.*row 4"),
        (lambda: NormalScores(scale="identity").fit(_losses()).transform(np.r_[np.ones(4), -np.inf]), "-inf.*row 4"),
        (lambda: NormalScores().fit(_losses()).refit(np.ones(5), _losses()), "rows must be booleans"),
        (lambda: NormalScores().fit(_losses()).refit(np.arange(5) < 2, _losses()), "each of the 2 clients"),
    ],
)
def test_bad_losses_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
