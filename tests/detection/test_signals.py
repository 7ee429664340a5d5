import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from detection import Gaussian, GaussianBox, RobustScoreCUSUM, confidence_box, default_post, exact_run_length
from detection.signals import cross_entropy, energy, entropy, margin, max_probability, scale_post, vector_signal


def test_signals_are_those_of_the_probabilities():
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((200, 7)), rng.integers(0, 7, 200)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ordered = np.sort(p, axis=1)
    assert_allclose(entropy(logits), [stats.entropy(row) for row in p], rtol=1e-12)
    assert_allclose(max_probability(logits), ordered[:, -1], rtol=1e-12)
    assert_allclose(margin(logits), np.log(ordered[:, -1] / ordered[:, -2]), rtol=1e-10)
    assert_allclose(cross_entropy(logits, labels), -np.log(p[np.arange(200), labels]), rtol=1e-12)
    assert_allclose(energy(logits, 2.0), -2 * np.log(np.exp(logits / 2).sum(axis=1)), rtol=1e-12)


def test_the_loss_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logits, labels = 5 * rng.standard_normal((50, 4)), rng.integers(0, 4, 50)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none")
    assert_allclose(cross_entropy(logits, labels), expected.numpy(), rtol=1e-10)


def test_huge_logits_do_not_overflow():
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    assert_allclose(entropy(logits), [0.0, np.log(3)], atol=1e-12)
    assert_allclose(margin(logits), [1e4, 0.0])
    assert_allclose(cross_entropy(logits, np.array([1, 0])), [2e4, np.log(3)])
    assert_allclose(energy(logits), [-1e4, 1e4 - np.log(3)])


def test_only_energy_sees_a_constant_added_to_all_logits():
    logits = np.random.default_rng(2).standard_normal((30, 5))
    for signal in (entropy, margin, max_probability):
        assert_allclose(signal(logits + 7.0), signal(logits), rtol=1e-9)
    assert_allclose(energy(logits + 7.0), energy(logits) - 7.0)


def test_the_vector_holds_loss_entropy_and_margin():
    rng = np.random.default_rng(3)
    logits, labels = rng.standard_normal((20, 3)), rng.integers(0, 3, 20)
    signal = vector_signal(logits, labels)
    assert signal.shape == (20, 3)
    assert_array_equal(signal, np.column_stack((cross_entropy(logits, labels), entropy(logits), margin(logits))))


def test_a_model_may_grow_surer_while_it_is_wrong():
    rng = np.random.default_rng(4)
    logits, labels = rng.standard_normal((500, 3)), rng.integers(0, 3, 500)
    drifted = 4 * logits
    assert cross_entropy(drifted, labels).mean() > cross_entropy(logits, labels).mean()
    assert entropy(drifted).mean() < entropy(logits).mean()


def test_a_design_for_scale_catches_what_a_design_for_the_mean_is_nearly_blind_to():
    pre = confidence_box(n=100)
    scale = RobustScoreCUSUM.fit(pre=pre, post=scale_post(pre), arl=1000)
    mean = RobustScoreCUSUM.fit(pre=pre, post=default_post(pre), arl=1000)
    delays = {name: exact_run_length(d.increment, Gaussian(0.0, 2.0), d.threshold) for name, d in (("scale", scale), ("mean", mean))}
    assert delays["scale"] == pytest.approx(51, abs=0.5)
    assert delays["mean"] == pytest.approx(699, abs=5)
    shifted = {name: exact_run_length(d.increment, Gaussian(1.0, 1.0), d.threshold) for name, d in (("scale", scale), ("mean", mean))}
    assert shifted["mean"] < 0.4 * shifted["scale"]
    assert scale.promise().arl >= 1000


def test_a_fall_of_scale_has_its_own_set():
    pre = confidence_box(n=100)
    post = scale_post(pre, variance=0.5, shift=0.2)
    assert post == GaussianBox(mean=(-0.2, 0.2), variance=(0.25, 0.5))
    detector = RobustScoreCUSUM.fit(pre=pre, post=post, arl=1000)
    assert detector.promise().arl >= 1000
    assert exact_run_length(detector.increment, Gaussian(0.0, 0.3), detector.threshold) < 60


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: entropy(np.ones(4)), r"\(N, K\)"),
        (lambda: entropy(np.ones((4, 1))), "at least 2 classes"),
        (lambda: margin([[1.0, 2.0], [np.nan, 0.0]]), "the first is row 1"),
        (lambda: cross_entropy(np.ones((2, 3)), np.array([0, 3])), r"0 .. 2, got 0 to 3"),
        (lambda: cross_entropy(np.ones((2, 3)), np.array([0.0, 1.0])), "integers"),
        (lambda: energy(np.ones((2, 3)), 0.0), "temperature must be positive"),
        (lambda: scale_post(confidence_box(n=100), variance=1.1), "outside those before"),
        (lambda: scale_post(confidence_box(n=100), variance=1.0), "not 1"),
    ],
)
def test_bad_logits_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
