import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detection import FiniteSet, Gaussian, GaussianBox, RobustScoreCUSUM, Singleton, fisher_divergence, least_favourable, score_increment
from detection.closest_pairs import closest_pair
from detection.design import SimulatedPromise, run_length_interval
from detection.expectations import moments, nodes_of
from detection.frank_wolfe import Pooled, closest_mixture, scores_at
from detection.gaussian_means import GaussianEllipsoid
from detection.hulls import MixtureHull, ObservedLaw, PosteriorMixture, SampledSet
from detection.mixtures import KernelDensity, Mixture

NULL = Gaussian(0.0, 1.0)
LAWS = (Gaussian(1.0, 0.5), Gaussian(2.0, 1.5), Gaussian(3.0, 1.0))
HULL = MixtureHull(LAWS)


def divergence(post, pre):
    """`D_F(post || pre)` by a plain trapezoid sum on a fine grid, for laws of numbers."""
    x = np.linspace(-30, 30, 6_001)
    return 0.5 * np.trapezoid(np.exp(post.log_density(x)) * (post.score(x) - pre.score(x)) ** 2, x)


def bayes(laws):
    """The ideal classifier between `laws`, all equally likely."""

    def posterior(x):
        joint = np.stack([law.log_density(x) for law in laws], axis=-1)
        shares = np.exp(joint - joint.max(axis=-1, keepdims=True))
        return shares / shares.sum(axis=-1, keepdims=True)

    return posterior


def samples_of(laws, num, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(law.sample(rng, num) for law in laws)


def test_the_least_favourable_mixture_is_the_known_one_with_its_certificate():
    pair = least_favourable(Singleton(NULL), HULL)
    assert pair.weights == pytest.approx((0.9822, 0.0178, 0.0), abs=5e-5)
    assert pair.divergence == pytest.approx(0.743973, abs=5e-7)
    assert 0 <= pair.gap <= 1e-9
    increment = score_increment(pair.pre, pair.post)
    drifts = [moments(increment, law).drift().value for law in LAWS]
    assert drifts == pytest.approx([0.743973, 0.743973, 1.59815], abs=5e-6)
    assert pair.margins == pytest.approx((-divergence(NULL, pair.post), 0.743973), abs=1e-6)


def test_no_mixture_of_a_grid_is_closer_and_none_drifts_less():
    pair = least_favourable(Singleton(NULL), HULL)
    grid = [w for w in itertools.product(np.linspace(0, 1, 17), repeat=2) if sum(w) <= 1]
    near = [(1 - a - b, a, b) for a in np.linspace(0.0, 0.05, 21) for b in (0.0, 0.001)]
    mixtures = [Mixture(LAWS, w) for w in [(1 - a - b, a, b) for a, b in grid] + near]
    assert min(divergence(mixture, NULL) for mixture in mixtures) >= pair.divergence - 1e-9
    increment = score_increment(pair.pre, pair.post)
    for mixture in mixtures[::10]:
        assert moments(increment, mixture).drift().value >= pair.divergence - pair.gap - 1e-9


def test_the_pythagorean_inequality_is_tight_on_the_support_alone():
    pair = least_favourable(Singleton(NULL), HULL)
    slack = [divergence(law, NULL) - divergence(law, pair.post) - pair.divergence for law in LAWS]
    assert slack == pytest.approx([0.0, 0.0, 0.854], abs=5e-4)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 4.0), st.floats(0.4, 3.0)), min_size=2, max_size=5, unique=True),
    st.floats(0.5, 2.0),
)
def test_every_component_of_any_hull_drifts_by_the_certified_amount(parameters, variance):
    hull, null = MixtureHull(tuple(Gaussian(m, v) for m, v in parameters)), Gaussian(0.0, variance)
    found = closest_pair(Singleton(null), hull)
    increment = score_increment(null, found.post)
    assert found.gap <= 1e-8 * found.divergence
    assert min(moments(increment, law).drift().value for law in hull.laws) >= found.divergence * (1 - 1e-6)
    assert found.divergence <= min(fisher_divergence(law, null) for law in hull.laws) * (1 + 1e-9)


def test_a_hull_known_by_samples_gives_the_same_pair_within_their_error():
    known = SampledSet(samples_of(LAWS, 40_000), LAWS)
    pair = least_favourable(Singleton(NULL), known)
    assert pair.divergence == pytest.approx(0.743973, abs=0.02)
    assert pair.weights == pytest.approx((0.9822, 0.0178, 0.0), abs=0.04)
    assert pair.margins[1] == pytest.approx(0.743973, abs=4 * pair.standard_errors[1])
    assert 0 < pair.standard_errors[1] < 0.02


def test_scores_learned_from_the_samples_give_a_pair_that_separates_the_sets():
    pair = least_favourable(Singleton(NULL), SampledSet(samples_of(LAWS, 2_000)))
    assert isinstance(pair.post, KernelDensity | Mixture)
    assert pair.margins[0] < 0 < pair.margins[1]
    assert pair.divergence == pytest.approx(0.744, abs=0.2)


def test_a_classifier_stands_for_densities():
    laws = tuple(Gaussian(m, ((1.0, 0.2), (0.2, 1.0))) for m in ((1.0, 0.0), (0.0, 2.0)))
    samples = samples_of(laws, 20_000)
    null = Singleton(Gaussian((0.0, 0.0), ((1.0, 0.2), (0.2, 1.0))))
    densities, classified = SampledSet(samples, laws), SampledSet(samples, laws, bayes(laws))
    first, second = (least_favourable(null, known, rng=np.random.default_rng(0)) for known in (densities, classified))
    assert second.weights == pytest.approx(first.weights, abs=1e-6)
    mixture = PosteriorMixture(laws=laws, weights=(0.3, 0.7), posterior=bayes(laws))
    x = np.random.default_rng(1).standard_normal((3, 5, 2)) * 2
    exact = Mixture(laws, (0.3, 0.7))
    np.testing.assert_allclose(mixture.score(x), exact.score(x), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mixture.laplacian(x), exact.laplacian(x), rtol=1e-10, atol=1e-12)


def test_a_pre_change_hull_is_searched_to_the_best_mixture_of_a_grid():
    pre = (Gaussian(0.0, 1.0), Gaussian(-0.5, 2.0))
    found = closest_pair(MixtureHull(pre), Singleton(Gaussian(2.0, 1.0)))
    grid = min(divergence(Gaussian(2.0, 1.0), Mixture(pre, (1 - w, w))) for w in np.linspace(0, 1, 101))
    assert found.divergence <= grid + 1e-9
    assert found.divergence == pytest.approx(divergence(Gaussian(2.0, 1.0), found.pre), rel=1e-7)


def test_two_hulls_end_at_a_pair_that_no_grid_of_both_improves():
    pre, post = (Gaussian(0.0, 1.0), Gaussian(0.0, 3.0)), (Gaussian(2.0, 1.0), Gaussian(3.0, 0.5))
    found = closest_pair(MixtureHull(pre), MixtureHull(post))
    shares = np.linspace(0, 1, 16)
    grid = min(divergence(Mixture(post, (1 - b, b)), Mixture(pre, (1 - a, a))) for a in shares for b in shares)
    assert found.divergence <= grid + 1e-7


@pytest.mark.parametrize("box", [GaussianBox(mean=(-0.5, 0.3), variance=(0.5, 2.0)), GaussianBox(mean=(-3.0, -1.0), variance=(4.0, 9.0))])
@pytest.mark.slow
def test_a_box_against_a_hull_is_fitted_to_the_best_member_of_a_grid(box):
    found = closest_pair(box, HULL)
    members = [Gaussian(m, v) for m in np.linspace(*box.mean, 11) for v in np.linspace(*box.variance, 11)]
    grid = min(divergence(found.post, law) for law in members)
    assert found.divergence <= grid + 1e-9
    assert found.divergence <= min(closest_pair(Singleton(law), HULL).divergence for law in members[::40]) + 1e-9


@pytest.mark.slow
def test_an_ellipsoid_against_a_hull_is_fitted_to_its_best_member():
    covariance = ((1.0, 0.4), (0.4, 1.0))
    pre = GaussianEllipsoid(mean=(0.0, 0.0), shape=((0.2, 0.0), (0.0, 0.05)), covariance=covariance)
    hull = MixtureHull((Gaussian((2.0, 0.0), covariance), Gaussian((1.5, 1.5), covariance)))
    found = closest_pair(pre, hull, rng=np.random.default_rng(0), num=3_000)
    x = nodes_of(found.post, rng=np.random.default_rng(1), num=10_000).points
    angles = np.linspace(0, 2 * np.pi, 181)
    members = [pre.at(np.array([np.cos(a), np.sin(a)])) for a in angles]
    own, *others = (0.5 * ((found.post.score(x) - law.score(x)) ** 2).sum(axis=1).mean() for law in (found.pre, *members))
    assert own <= min(others) * 1.01


def test_a_component_alone_is_its_own_mixture():
    assert MixtureHull((LAWS[0],)).centre() == LAWS[0]
    assert closest_pair(Singleton(NULL), MixtureHull((LAWS[0],))).post == LAWS[0]
    assert HULL.centre() == Mixture(LAWS, (1 / 3,) * 3)
    assert HULL.extreme() == LAWS


def test_a_hull_that_holds_the_pre_change_law_is_refused_by_name():
    inside = Mixture((Gaussian(-1.0, 1.0), Gaussian(1.0, 1.0)), (0.3, 0.7))
    with pytest.raises(ValueError, match=r"must be apart, but both hold Mixture"):
        least_favourable(Singleton(inside), MixtureHull((Gaussian(-1.0, 1.0), Gaussian(1.0, 1.0))))
    with pytest.raises(ValueError, match=r"must be apart, but both hold Gaussian\(mean=0\.0"):
        least_favourable(MixtureHull((NULL, Gaussian(-1.0, 1.0))), MixtureHull((NULL, Gaussian(1.0, 1.0))))


def test_a_sign_that_the_samples_do_not_establish_is_refused_and_more_samples_establish_it():
    laws = (Gaussian(0.15, 1.0),)
    with pytest.raises(ValueError, match=r"its sign is not established at confidence 0\.99"):
        least_favourable(Singleton(NULL), SampledSet(samples_of(laws, 400), laws))
    assert least_favourable(Singleton(NULL), SampledSet(samples_of(laws, 40_000), laws)).margins[1] > 0


def test_the_margin_of_a_sampled_set_fails_to_hold_no_more_often_than_stated():
    laws, design, refused = (Gaussian(0.04, 1.0),), (Gaussian(0.08, 1.0),), 0  # the true drift is 0
    for seed in range(200):
        try:
            least_favourable(Singleton(NULL), SampledSet(samples_of(laws, 2_000, seed), design), confidence=0.95)
        except ValueError:
            refused += 1
    assert refused >= 0.93 * 200


@pytest.mark.slow
def test_a_robust_detector_of_a_hull_keeps_its_promise():
    rng = np.random.default_rng(0)
    detector = RobustScoreCUSUM.fit(pre=Singleton(NULL), post=HULL, arl=300, clip=None, rng=rng)
    promise = detector.promise(rng)
    assert isinstance(promise, SimulatedPromise)
    assert promise.arl_interval[1] >= 300
    assert promise.arl_interval[0] >= promise.floor
    assert promise.arl <= 400
    assert moments(detector.increment, NULL).log_moment(1.0) == pytest.approx(0.0, abs=1e-9)
    assert promise.worst_post in LAWS


@pytest.mark.parametrize("threshold", [2.0, 4.0])
def test_a_detector_of_sampled_sets_has_a_run_length_of_at_least_the_exponential_of_its_threshold(threshold):
    rng = np.random.default_rng(1)
    pre = SampledSet((NULL.sample(rng, 20_000),), (NULL,))
    fitted = RobustScoreCUSUM.fit(pre=pre, post=SampledSet(samples_of(LAWS, 5_000), LAWS), arl=50, clip=None, rng=rng, num=10_000)
    z = fitted.increment(NULL.sample(rng, 2_000 * 1_000)).reshape(2_000, 1_000)
    statistic, ticks, alarms = np.zeros(2_000), 0, 0
    for column in z.T:
        statistic = np.maximum(statistic + column, 0.0)
        ended = statistic >= threshold
        ticks, alarms = ticks + 2_000, alarms + int(ended.sum())
        statistic[ended] = 0.0
    assert run_length_interval(ticks, alarms)[0] >= np.exp(threshold)


@pytest.mark.slow
def test_a_hull_of_corruptions_known_by_learned_scores_has_a_robust_detector():
    pytest.importorskip("torch")
    from detection.score_matching import fit_score

    rng = np.random.default_rng(0)
    laws = (Gaussian((0.0, 0.0), 1.0), Gaussian((1.5, 0.0), 1.0), Gaussian((0.0, 1.5), (1.0, 2.0)))
    samples = [law.sample(rng, 4_000) for law in laws]
    learned = [fit_score(sample, hidden=(16,), sigma=0.2, steps=250, batch=256) for sample in samples]
    fresh = samples_of(laws, 6_000, seed=2)
    post = SampledSet(fresh[1:], tuple(learned[1:]), bayes(laws[1:]))
    pre = SampledSet(fresh[:1], (learned[0],))
    detector = RobustScoreCUSUM.fit(pre=pre, post=post, arl=100, clip=None, rng=rng, method="floor")
    assert detector.pair.margins[0] < 0 < detector.pair.margins[1]
    state = detector.init(4)
    for _ in range(80):
        state = detector.step(state, laws[1].sample(rng, 4))
    assert detector.alarms(state).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureHull(()), "at least one law"),
        (lambda: MixtureHull((NULL, ObservedLaw(NULL, np.zeros(100)))), "log_density"),
        (lambda: MixtureHull((NULL, Gaussian((0.0, 0.0), 1.0))), "one dimension"),
        (lambda: SampledSet((np.zeros(50),)), "at least 100 finite observations"),
        (lambda: SampledSet((np.full(200, np.nan),)), "at least 100 finite observations"),
        (lambda: SampledSet((np.zeros(200), np.zeros((200, 2)))), "one dimension"),
        (lambda: SampledSet(samples_of(LAWS, 200), LAWS[:2]), "each of the 3 samples"),
        (lambda: SampledSet(samples_of(LAWS[:2], 200), (NULL, ObservedLaw(NULL, np.arange(100.0)))), "pass posterior"),
        (lambda: SampledSet(samples_of(LAWS[:2], 200), LAWS[:2], lambda x: np.ones((len(x), 2))).log_odds(np.zeros(3)), "sum to 1"),
        (lambda: RobustScoreCUSUM.fit(pre=Singleton(NULL), post=HULL, arl=100), "pass rng"),
        (lambda: least_favourable(Singleton(Gaussian((0.0,), 1.0)), MixtureHull((Gaussian((1.0,), 1.0),))), "pass rng"),
        (lambda: least_favourable(FiniteSet((NULL,)), Singleton(Gaussian((1.0, 1.0), 1.0))), "one dimension"),
    ],
)
def test_impossible_hulls_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_frank_wolfe_steps_end_from_any_start_at_the_same_mixture():
    pooled = Pooled.of(HULL, HULL.pooled())
    reference = scores_at(NULL, pooled.points)
    ends = [closest_mixture(pooled, reference, 1e-10, np.array(start)) for start in ([1.0, 0, 0], [0, 0, 1.0], [0.2, 0.3, 0.5])]
    for end in ends:
        assert end.divergence == pytest.approx(0.743973, abs=5e-7)
        np.testing.assert_allclose(end.weights, ends[0].weights, atol=1e-6)
