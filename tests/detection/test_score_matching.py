import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from detection.laws import Gaussian, Law
from detection.mixtures import Mixture
from detection.score_matching import ScoreNetwork, fit_score

CORRELATED = Gaussian((0.5, -1.0, 2.0), ((2.0, 0.3, 0.1), (0.3, 1.0, -0.4), (0.1, -0.4, 1.5)))
TRAINING = CORRELATED.sample(np.random.default_rng(0), 20_000)
HELD_OUT = CORRELATED.sample(np.random.default_rng(1), 5000)


def _error(law: Law, truth: Law, x: np.ndarray) -> float:
    """Squared error of the score over its square."""
    return float(((law.score(x) - truth.score(x)) ** 2).sum() / (truth.score(x) ** 2).sum())


def _quick(data: np.ndarray, **settings: object) -> ScoreNetwork:
    return fit_score(data, **{"hidden": (16,), "steps": 30, "batch": 64, **settings})


def _random_network(size: int, **fields: object) -> ScoreNetwork:
    rng = np.random.default_rng(2)
    ends = (max(size, 1), 8, 6, max(size, 1))
    layers = list(pairwise(ends))
    return ScoreNetwork(
        weights=tuple(rng.normal(size=shape) for shape in layers),
        biases=tuple(rng.normal(size=shape[1]) for shape in layers),
        linear=rng.normal(size=(ends[0], ends[0])),
        centre=rng.normal(size=ends[0]),
        scale=rng.uniform(0.5, 2.0, ends[0]),
        dimension=size,
        **fields,
    )


@pytest.fixture(scope="module")
def learned() -> ScoreNetwork:
    return fit_score(TRAINING)


def test_denoising_learns_the_score_of_a_correlated_gaussian_to_a_thousandth(learned):
    assert _error(learned, CORRELATED, HELD_OUT) < 0.0015
    smoothed = Gaussian(CORRELATED.mean, CORRELATED.covariance + 0.01 * np.diag(np.diag(CORRELATED.covariance)))
    assert _error(learned, smoothed, HELD_OUT) < _error(learned, CORRELATED, HELD_OUT)
    np.testing.assert_allclose(learned.laplacian(HELD_OUT).mean(), CORRELATED.laplacian(HELD_OUT).mean(), rtol=0.03)


@pytest.mark.parametrize("method", ["denoising", "sliced", "exact"])
def test_every_method_learns_with_few_steps(method):
    law = fit_score(TRAINING, method=method, hidden=(32,), steps=300, batch=256)
    nothing = fit_score(TRAINING, method=method, hidden=(32,), steps=1, rate=1e-9)
    assert _error(law, CORRELATED, HELD_OUT) < min(0.01, 0.2 * _error(nothing, CORRELATED, HELD_OUT))


def test_two_modes_are_learned_as_the_mixture_after_its_noise():
    modes = Mixture([Gaussian(-2.0, 0.25), Gaussian(2.0, 1.0)], [0.5, 0.5])
    data = modes.sample(np.random.default_rng(3), 10_000)
    law = fit_score(data, steps=1000, rate=5e-3, hidden=(32, 32), batch=256)
    noise = (0.1 * data.std()) ** 2
    smoothed = Mixture([Gaussian(-2.0, 0.25 + noise), Gaussian(2.0, 1.0 + noise)], [0.5, 0.5])
    x = modes.sample(np.random.default_rng(4), 5000)
    assert _error(law, smoothed, x) < 0.02
    assert law.score(x).shape == law.laplacian(x).shape == (5000,)
    assert law.sample(np.random.default_rng(5), 7).shape == (7,)


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("activation", ["softplus", "silu", "tanh"])
def test_the_laplacian_is_the_divergence_of_the_score(size, activation):
    law, h = _random_network(size, activation=activation), 1e-5
    x = np.random.default_rng(6).normal(size=(5, size) if size else 5)
    steps = h * np.eye(size) if size else [h]
    parts = [(law.score(x + e) - law.score(x - e)) / (2 * h) for e in steps]
    np.testing.assert_allclose(law.laplacian(x), sum(p[:, k] for k, p in enumerate(parts)) if size else parts[0], rtol=1e-7, atol=1e-7)
    square = law.score(x) ** 2
    np.testing.assert_allclose(law.hyvarinen(x), 0.5 * (square.sum(-1) if size else square) + law.laplacian(x), rtol=1e-12)
    np.testing.assert_array_equal(law.laplacian_variance(x), np.zeros(5))
    assert law.laplacian(x.reshape(1, *x.shape)).shape == (1, 5)
    assert law.score(x[:0]).shape == x[:0].shape
    assert isinstance(law, Law)


def test_in_many_dimensions_the_laplacian_is_estimated_without_bias_and_its_variance_is_reported():
    law = _random_network(20, probes=8)
    x, h = np.random.default_rng(7).normal(size=(2000, 20)), 1e-5
    exact = sum((law.score(x + e) - law.score(x - e))[:, k] / (2 * h) for k, e in enumerate(h * np.eye(20)))
    off, variance = law.laplacian(x) - exact, law.laplacian_variance(x)
    assert abs(off.mean()) < 4 * off.std() / np.sqrt(2000)
    assert np.mean(off**2) == pytest.approx(variance.mean(), rel=0.15)
    assert replace(law, probes=64).laplacian_variance(x).mean() == pytest.approx(variance.mean() / 8, rel=0.15)
    assert np.isnan(replace(law, probes=1).laplacian_variance(x)).all()


def test_estimates_are_a_function_of_the_observation():
    law = _random_network(20)
    x = np.random.default_rng(8).normal(size=(40, 20))
    order = np.random.default_rng(9).permutation(40)
    whole = law.hyvarinen(x)
    np.testing.assert_allclose(np.concatenate([law.hyvarinen(row[None]) for row in x]), whole, rtol=1e-12)
    np.testing.assert_allclose(law.hyvarinen(x[order]), whole[order], rtol=1e-12)


def test_a_fit_is_a_function_of_its_seed_and_follows_the_units_of_its_data():
    data = TRAINING[:1000]
    law = _quick(data)
    assert _quick(data) == law
    assert _quick(data, seed=1) != law
    moved = _quick(data * (1000.0, 1.0, 0.01) + 5.0)
    np.testing.assert_allclose(moved.score(data * (1000.0, 1.0, 0.01) + 5.0) * (1000.0, 1.0, 0.01), law.score(data), atol=1e-3)


def test_draws_are_training_data_plus_the_training_noise():
    law = _quick(TRAINING[:1000])
    assert np.cov(law.sample(np.random.default_rng(10), 50_000).T) == pytest.approx(
        np.cov(TRAINING[:1000].T) * (1 + 0.01 * np.eye(3)), abs=0.04
    )
    exact = _quick(TRAINING[:50], method="exact")
    assert {tuple(row) for row in exact.sample(np.random.default_rng(11), 100)} <= {tuple(row) for row in TRAINING[:50]}
    with pytest.raises(ValueError, match="no sampler of its own"):
        replace(law, data=None).sample(np.random.default_rng(12), 3)


def test_progress_is_reported_and_falls():
    seen: list[tuple[int, float]] = []
    _quick(TRAINING[:2000], steps=400, batch=1024, progress=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [100, 200, 300, 400]
    assert seen[-1][1] < seen[0][1]


def test_a_checkpoint_is_the_network(tmp_path):
    for law in (_quick(TRAINING[:100]), _random_network(0), _random_network(20, probes=3, activation="silu")):
        law.save(tmp_path / "law")
        again = ScoreNetwork.load(tmp_path / "law")
        assert again == law
        x = np.random.default_rng(13).normal(size=(4, law.dimension) if law.dimension else 4)
        np.testing.assert_array_equal(again.hyvarinen(x), law.hyvarinen(x))
    assert [path.name for path in tmp_path.iterdir()] == ["law"]
    assert pickle.loads(pickle.dumps(law)) == law
    assert hash(again) == hash(law)


def test_a_damaged_checkpoint_is_refused_or_intact(tmp_path):
    law, path = _random_network(2), tmp_path / "law"
    law.save(path)
    sound = path.read_bytes()
    rng = np.random.default_rng(14)
    for cut in (0, 10, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:cut])
        with pytest.raises(ValueError, match="must be a score network written by save"):
            ScoreNetwork.load(path)
    for at in rng.choice(len(sound), 300, replace=False):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ (1 << int(rng.integers(8)))]) + sound[at + 1 :])
        try:
            assert ScoreNetwork.load(path) == law
        except ValueError as error:
            assert "must be a score network" in str(error)  # noqa: PT017 - either outcome is sound


def test_a_file_of_another_kind_is_refused_and_nothing_in_it_is_run(tmp_path):
    path = tmp_path / "other"
    with path.open("wb") as file:
        np.savez(file, weights=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        ScoreNetwork.load(path)
    with pytest.raises(FileNotFoundError):
        ScoreNetwork.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "smooth.*piecewise constant"),
        ({"method": "guess"}, "method must be one of"),
        ({"device": "toaster"}, "device must be 'cpu' or 'cuda'"),
        ({"device": "meta"}, "device must be 'cpu' or 'cuda'"),
        ({"device": "cuda:63"}, "is not there"),
        ({"sigma": 0.0}, "sigma, rate"),
        ({"hidden": ()}, "hidden must be positive"),
        ({"rate": 1e30, "steps": 30}, "diverged"),
    ],
)
def test_impossible_fits_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _quick(TRAINING[:100], **settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.full((10, 2), 3.0), r"constant in \[0, 1\]"),
        (np.array([0.0, np.nan]), "finite observations"),
        (np.zeros(1), "at least two"),
        (np.zeros((2, 3, 4)), "at least two"),
    ],
)
def test_data_without_a_score_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        fit_score(data)
    with pytest.raises(ValueError, match="at most 16, got 17"):
        fit_score(np.random.default_rng(15).normal(size=(9, 17)), method="exact")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"centre": np.zeros(2)}, "must fit them"),
        ({"weights": ()}, "must fit them|argument 2 is longer"),
        ({"data": np.empty((0, 3))}, "must fit them"),
        ({"scale": np.zeros(3)}, "scale positive"),
        ({"linear": np.full((3, 3), np.nan)}, "finite"),
        ({"probes": 0}, "probes at least 1"),
        ({"activation": "relu"}, "smooth"),
    ],
)
def test_impossible_networks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(_random_network(3), **fields)


def _delay(increment, arl: float = 500.0) -> float:
    """Mean delay at the threshold whose mean time between false alarms, over 150 paths of 1000 ticks, is ``arl``."""
    rng = np.random.default_rng(16)
    quiet = increment(CORRELATED.sample(rng, 150_000)).reshape(150, 1000)
    changed = increment(CORRELATED.sample(rng, 60_000) + SHIFT).reshape(600, 100)
    maxima = [np.maximum.accumulate(_reflected(z), axis=1) for z in (quiet, changed)]

    def first(threshold: float, paths: np.ndarray) -> tuple[int, int]:
        below = (paths < threshold).sum(axis=1)
        alarms = int((below < paths.shape[1]).sum())
        return int(below.sum()) + alarms, alarms

    grid = np.linspace(0.1, 20.0, 2000)
    threshold = next(b for b in grid if first(b, maxima[0])[0] >= arl * first(b, maxima[0])[1])
    ticks, alarms = first(threshold, maxima[1])
    assert alarms > 0.98 * 600
    return ticks / 600


def _reflected(z: np.ndarray) -> np.ndarray:
    total = np.cumsum(z, axis=1)
    return total - np.minimum(np.minimum.accumulate(total, axis=1), 0.0)


SHIFT = np.array([0.5, 0.5, 0.5])


@pytest.mark.slow
def test_a_detector_on_learned_scores_is_as_fast_as_on_true_ones(learned):
    after = Gaussian(np.asarray(CORRELATED.mean) + SHIFT, CORRELATED.covariance)
    learned_after = fit_score(after.sample(np.random.default_rng(17), 20_000), seed=1)
    true = _delay(lambda x: CORRELATED.hyvarinen(x) - after.hyvarinen(x))
    ratio = _delay(lambda x: after.log_density(x) - CORRELATED.log_density(x))
    assert _delay(lambda x: learned.hyvarinen(x) - learned_after.hyvarinen(x)) == pytest.approx(true, rel=0.08)
    assert ratio <= true


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_fit_on_a_gpu_learns_as_well():
    law = fit_score(TRAINING, steps=300, device="cuda")
    assert _error(law, CORRELATED, HELD_OUT) < 0.01
    np.testing.assert_allclose(replace(law, device="cpu").hyvarinen(HELD_OUT), law.hyvarinen(HELD_OUT), rtol=1e-9, atol=1e-9)
