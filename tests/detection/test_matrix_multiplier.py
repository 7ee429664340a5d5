import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import CUSUM, FiniteSet, Gaussian, GaussianBox, RobustScoreCUSUM, ScoreCUSUM, Singleton, exact_run_length
from detection.design import run_length_interval, simulated_delays
from detection.expectations import moments
from detection.gaussian_means import GaussianEllipsoid
from detection.hulls import MixtureHull, SampledSet
from detection.matrix_multiplier import MatrixIncrement, MatrixScoreCUSUM, RobustMatrixScoreCUSUM
from detection.mixtures import Mixture

COVARIANCE = ((1.0, 0.6, 0.3), (0.6, 1.0, 0.5), (0.3, 0.5, 1.0))
SHIFT = np.array([0.48, 0.32, 0.73])
NULL, CHANGED = Gaussian((0.0, 0.0, 0.0), COVARIANCE), Gaussian(tuple(SHIFT), COVARIANCE)
DIVERGENCE = 0.5 * SHIFT @ np.linalg.inv(COVARIANCE) @ SHIFT  # Kullback-Leibler


def run_length(detector, law, runs=1_000, ticks=400, seed=0):
    """Two-sided interval of the run length under `law`, from restarted runs of the detector itself."""
    rng, state, alarms = np.random.default_rng(seed), detector.init(runs), 0
    for _ in range(ticks):
        state = detector.step(state, law.sample(rng, runs))
        fired = detector.alarms(state)
        alarms += int(fired.sum())
        state = detector.restart(state, fired)
    return run_length_interval(runs * ticks, alarms)


def test_the_matrix_recovers_cusum_for_gaussians_where_a_number_cannot():
    known = {"pre": Singleton(NULL), "post": Singleton(CHANGED), "arl": 1000, "clip": None}
    scalar, optimum = ScoreCUSUM.fit(**known), CUSUM.fit(**known)
    fitted = MatrixScoreCUSUM.fit(**known, rng=np.random.default_rng(0))
    delays = [exact_run_length(d.increment, CHANGED, d.threshold) for d in (scalar, optimum)]
    assert delays == pytest.approx([21.11, 14.57], abs=0.02)
    assert fitted.promise().delay == pytest.approx(delays[1], rel=0.02)
    assert fitted.increment.mean(CHANGED) == pytest.approx(DIVERGENCE, rel=0.01)
    assert fitted.increment.log_moment(NULL) <= 1e-9
    measured = simulated_delays(fitted, CHANGED, np.random.default_rng(1), 1_000)
    assert measured.mean() == pytest.approx(delays[1], abs=4 * measured.std() / np.sqrt(1_000))


def test_the_covariance_itself_is_a_best_matrix():
    design = MatrixIncrement(pre=NULL, post=CHANGED, matrix=COVARIANCE, offset=0.0)
    assert design.of(None).mean(CHANGED) == pytest.approx(DIVERGENCE, rel=1e-10)
    fitted = MatrixScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(CHANGED), arl=1000, rng=np.random.default_rng(0))
    assert fitted.increment.mean(CHANGED) <= DIVERGENCE * (1 + 1e-9)


@pytest.mark.slow
def test_the_matrix_of_other_laws_drifts_more_than_the_best_number_and_less_than_the_divergence():
    pre = Mixture((Gaussian((-1.0, 0.0), ((1.0, 0.8), (0.8, 1.0))), Gaussian((1.0, 0.0), ((1.0, 0.8), (0.8, 1.0)))), (0.5, 0.5))
    post = Mixture((Gaussian((-1.0, 0.7), ((1.0, 0.8), (0.8, 1.0))), Gaussian((1.0, 0.7), ((1.0, 0.8), (0.8, 1.0)))), (0.5, 0.5))
    rng = np.random.default_rng(0)
    known = {"pre": Singleton(pre), "post": Singleton(post), "arl": 200, "clip": None, "rng": rng, "method": "floor", "num": 40_000}
    fitted, scalar = MatrixScoreCUSUM.fit(**known), ScoreCUSUM.fit(**known)
    x, y = pre.sample(rng, 200_000), post.sample(rng, 200_000)
    divergence = (post.log_density(y) - pre.log_density(y)).mean()
    assert scalar.increment(y).mean() < fitted.increment(y).mean() < divergence + 0.01
    moment = np.exp(fitted.increment(x))
    assert moment.mean() <= 1.0 + 2 * moment.std() / np.sqrt(len(x))


@pytest.mark.parametrize("threshold", [2.0, 4.0])
@pytest.mark.slow
def test_a_fitted_matrix_keeps_the_run_length_above_the_exponential_of_the_threshold(threshold):
    mixture = Mixture((NULL, Gaussian((0.0, 1.0, 0.0), 1.0)), (0.8, 0.2))
    for pre, post in ((NULL, CHANGED), (mixture, Gaussian((1.0, 1.0, 1.0), COVARIANCE))):
        known = {"pre": Singleton(pre), "post": Singleton(post), "arl": np.exp(threshold), "method": "floor", "num": 20_000}
        detector = MatrixScoreCUSUM.fit(**known, rng=np.random.default_rng(0))
        assert detector.threshold == pytest.approx(threshold)
        assert run_length(detector, pre)[0] >= np.exp(threshold)


def test_a_matrix_separates_sets_that_their_closest_pair_does_not():
    pre, post = GaussianBox(mean=(0.0, 0.0), variance=(0.4, 2.7)), GaussianBox(mean=(0.8, 0.8), variance=(1.6, 1.8))
    with pytest.raises(ValueError, match=r"drifts by \+0\.0188"):
        RobustScoreCUSUM.fit(pre=pre, post=post, clip=None)
    detector = RobustMatrixScoreCUSUM.fit(pre=pre, post=post, arl=1000, rng=np.random.default_rng(0))
    promise = detector.promise()
    assert promise.arl == pytest.approx(1000, rel=1e-3)
    assert promise.delay == pytest.approx(36.6, abs=0.2)
    for v in np.linspace(0.4, 2.7, 24):
        assert detector.increment.mean(Gaussian(0.0, v)) < 0
        assert detector.increment.log_moment(Gaussian(0.0, v)) <= 1e-6
        assert exact_run_length(detector.increment, Gaussian(0.0, v), detector.threshold) >= 0.995 * promise.arl
    assert min(detector.increment.mean(Gaussian(0.8, v)) for v in np.linspace(1.6, 1.8, 9)) > 0


def test_the_robust_matrix_reaches_the_best_least_drift_of_a_grid_of_quadratics():
    pre, post = GaussianBox(mean=(0.0, 0.0), variance=(0.4, 2.7)), GaussianBox(mean=(0.8, 0.8), variance=(1.6, 1.8))
    detector = RobustMatrixScoreCUSUM.fit(pre=pre, post=post, arl=1000, rng=np.random.default_rng(0))
    changes = [Gaussian(0.8, v) for v in np.linspace(1.6, 1.8, 5)]
    plain = MatrixIncrement(pre=detector.design.pre, post=detector.design.post, matrix=((1.0,),), offset=0.0).of(None)
    best = -np.inf
    for scale in np.linspace(0.5, 5.0, 91):
        level = max(plain.log_moment(Gaussian(0.0, v), scale) for v in np.linspace(0.4, 2.7, 47))
        best = max(best, min(scale * plain.mean(law) for law in changes) - level)
    assert min(detector.increment.mean(law) for law in changes) >= best * (1 - 1e-3)


@pytest.mark.slow
def test_the_robust_matrix_covers_an_ellipsoid_and_a_hull_with_less_delay_than_a_number():
    rng = np.random.default_rng(0)
    pre = GaussianEllipsoid(mean=(0.0, 0.0, 0.0), shape=0.01 * np.eye(3), covariance=COVARIANCE)
    post = GaussianEllipsoid(mean=(1.0, 0.3, 1.2), shape=0.05 * np.eye(3), covariance=COVARIANCE)
    scalar = RobustScoreCUSUM.fit(pre=pre, post=post, arl=500, clip=None)
    fitted = RobustMatrixScoreCUSUM.fit(pre=pre, post=post, arl=500, rng=rng, num=20_000)
    promise = fitted.promise()
    assert promise.arl == pytest.approx(500, rel=0.01)
    assert promise.delay <= scalar.promise().delay * 1.01
    hull = MixtureHull((Gaussian((1.0, 0.0, 1.0), COVARIANCE), Gaussian((0.0, 1.0, 1.0), COVARIANCE)))
    both = RobustMatrixScoreCUSUM.fit(pre=Singleton(NULL), post=hull, arl=100, rng=rng, num=20_000, method="floor")
    assert min(moments(both.increment, law, rng=rng, num=20_000).drift().value for law in hull.laws) > 0
    assert run_length(both, NULL, ticks=300)[0] >= np.exp(both.threshold)


def test_laws_known_by_samples_and_scores_have_a_matrix_too():
    rng = np.random.default_rng(0)
    pre, post = (SampledSet((law.sample(rng, 20_000),), (law,)) for law in (NULL, CHANGED))
    detector = MatrixScoreCUSUM.fit(pre=pre, post=post, arl=100, rng=rng)
    assert exact_run_length(detector.increment, NULL, detector.threshold) >= 95
    assert exact_run_length(detector.increment, CHANGED, detector.threshold) < 12


@pytest.mark.slow
def test_learned_scores_with_a_matrix_are_nearly_as_fast_as_cusum():
    pytest.importorskip("torch")
    from detection.score_matching import fit_score

    rng, delays = np.random.default_rng(0), {}
    learned = [fit_score(law.sample(rng, 20_000)) for law in (NULL, CHANGED)]
    pre, post = (SampledSet((law.sample(rng, 40_000),), (score,)) for law, score in zip((NULL, CHANGED), learned, strict=True))
    for kind in (ScoreCUSUM, MatrixScoreCUSUM):
        fitted = kind.fit(pre=pre, post=post, arl=1000, clip=None, rng=rng)
        low, high = run_length(fitted, NULL, ticks=300)
        assert low <= 1_300
        assert high >= 950
        delays[kind] = simulated_delays(fitted, CHANGED, rng, 500).mean()
    assert delays[ScoreCUSUM] == pytest.approx(21.1, rel=0.1)
    assert delays[MatrixScoreCUSUM] == pytest.approx(14.6, rel=0.1)


def test_streams_are_batched_and_independent():
    mixture = Mixture((NULL, CHANGED), (0.5, 0.5))
    detector = MatrixScoreCUSUM(
        pre=Singleton(NULL),
        post=Singleton(mixture),
        design=MatrixIncrement(pre=NULL, post=mixture, matrix=COVARIANCE, offset=0.0),
        multiplier=1.0,
        threshold=3.0,
    )
    x = np.random.default_rng(0).standard_normal((20, 7, 3))
    together, alone = detector.init(7), [detector.init(1) for _ in range(7)]
    for row in x:
        together = detector.step(together, row)
        alone = [detector.step(state, row[[k]]) for k, state in enumerate(alone)]
    assert_array_equal(together.statistic, np.concatenate([state.statistic for state in alone]))
    assert_allclose(together.clock, 20)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda rng: MatrixScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(NULL), rng=rng), "drift"),
        (
            lambda rng: RobustMatrixScoreCUSUM.fit(
                pre=GaussianBox(mean=(-1.0, 1.0), variance=(1.0, 1.0)), post=Singleton(Gaussian(0.0, 1.0)), rng=rng
            ),
            "must be apart",
        ),
        (
            lambda rng: RobustMatrixScoreCUSUM.fit(
                pre=FiniteSet((Gaussian(0.0, 1.0), Gaussian(3.0, 1.0))), post=Singleton(Gaussian(1.2, 1.0)), rng=rng
            ),
            "no matrix separates the sets",
        ),
    ],
)
def test_sets_that_no_matrix_separates_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(np.random.default_rng(0))
