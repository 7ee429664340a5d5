from dataclasses import dataclass

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import CUSUM, Gaussian, NormalScores, Quartic, ReflectedSum, ScoreCUSUM, Singleton, Standardised, score_increment
from detection.increment import StreamwiseLine
from detection.laws import GaussianStreams
from detection.states import to_bytes
from detection.tabled_scores import TabledScores

N = 200_000  # more than a block


@dataclass(frozen=True, kw_only=True, eq=False)
class OnSignals(ReflectedSum):
    z: object

    def _increment(self):
        return self.z


@pytest.fixture(scope="module")
def signals():
    rng = np.random.default_rng(0)
    return rng.standard_normal(N), rng.uniform(0.5, 2.0, N), 3 * rng.standard_normal((3, N))


@pytest.mark.parametrize("variance", [1.0, 1.7])
def test_standardising_inside_the_step_equals_standardising_before_it(signals, variance):
    location, deviation, x = signals
    z = score_increment(Gaussian(0.0, 1.0), Gaussian(1.0, variance), clip=4.0)
    assert isinstance(Standardised.of(z, location, deviation), StreamwiseLine if variance == 1.0 else Standardised)
    inside = OnSignals(threshold=5.0, clip=4.0, z=Standardised.of(z, location, deviation))
    before = OnSignals(threshold=5.0, clip=4.0, z=z)
    first, second = inside.init(N), before.init(N)
    for row in x:
        first, second = inside.step(first, row), before.step(second, (row - location) / deviation)
    assert_allclose(first.statistic, second.statistic, rtol=0, atol=1e-12)
    assert second.statistic.max() > 5


def test_a_falling_line_keeps_its_clip(signals):
    location, deviation, x = signals
    z = score_increment(Gaussian(0.0, 1.0), Gaussian(-1.0, 1.0), clip=2.0).scaled(0.7)
    assert_allclose(Standardised.of(z, location, deviation)(x[0]), z((x[0] - location) / deviation), rtol=0, atol=1e-13)
    assert_allclose(Standardised.of(z, location, deviation).scaled(2.0)(x[0]), 2 * z((x[0] - location) / deviation), rtol=0, atol=1e-13)


def test_a_deviation_of_zero_is_refused():
    with pytest.raises(ValueError, match="deviations above 0"):
        Standardised.of(score_increment(Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)), np.zeros(2), np.array([1.0, 0.0]))


def test_a_law_for_each_stream_meets_its_own_stream_in_every_block(signals):
    location, deviation, x = signals
    pre, post = GaussianStreams(location, deviation**2), GaussianStreams(location + deviation, deviation**2)
    detector = ScoreCUSUM(pre=pre, post=post, multiplier=1.0, threshold=5.0)
    stepped = detector.step(detector.init(N), x[0]).statistic
    assert_array_equal(stepped, np.maximum(pre.hyvarinen(x[0]) - post.hyvarinen(x[0]), 0.0))


def test_a_spare_state_receives_the_bits_of_a_new_one(signals):
    detector = ScoreCUSUM.fit(pre=Singleton(Gaussian(0.0, 1.0)), post=Singleton(Gaussian(1.0, 1.0)))
    state, spare = detector.init(N), detector.init(N)
    active = np.random.default_rng(1).random(N) < 0.5
    for row in signals[2]:
        fresh = detector.step(state, row, active)
        given = detector.step(state, row, active, out=spare)
        assert given is spare
        assert to_bytes(given) == to_bytes(fresh)
        state, spare = spare, state


def test_a_state_cannot_be_its_own_room():
    detector = ScoreCUSUM.fit(pre=Singleton(Gaussian(0.0, 1.0)), post=Singleton(Gaussian(1.0, 1.0)))
    state = detector.init(3)
    for out in (state, detector.init(2)):
        with pytest.raises(ValueError, match="another state of 3 streams"):
            detector.step(state, np.zeros(3), out=out)


@pytest.fixture(scope="module", params=["log", "identity"])
def tabled(request):
    rng = np.random.default_rng(2)
    level = rng.normal(-1.0, 1.0, 2_000)
    draw = (
        (lambda n: rng.lognormal(level[:, None], 0.7, (2_000, n)))
        if request.param == "log"
        else (lambda n: rng.normal(level[:, None], 0.7, (2_000, n)))
    )
    return TabledScores.of(NormalScores(scale=request.param).fit(draw(50))), draw(40)


def test_tabled_scores_lie_within_their_bound_of_the_exact_ones(tabled):
    scores, losses = tabled
    exact = scores.fitted.transform(losses)
    off = np.abs(np.stack([scores.transform(row) for row in losses.T], axis=1) - exact)
    assert off.max() <= scores.bound
    assert off.mean() < 1e-3


def test_a_tabled_increment_equals_scores_then_increment(tabled):
    scores, losses = tabled
    z = score_increment(Gaussian(0.0, 1.0), Gaussian(1.0, 1.5), clip=4.0).scaled(0.8)
    at_once = OnSignals(threshold=5.0, clip=4.0, z=scores.increment(z))
    apart = OnSignals(threshold=5.0, clip=4.0, z=z)
    first, second = at_once.init(2_000), apart.init(2_000)
    for row in losses.T:
        row = row.copy()
        row[7] = np.inf
        first, second = at_once.step(first, row), apart.step(second, scores.transform(row))
    assert_allclose(first.statistic, second.statistic, rtol=0, atol=1e-12)


def test_the_table_keeps_the_exact_rules_for_missing_infinite_and_negative_losses(tabled):
    scores, losses = tabled
    row = losses[:, 0].copy()
    row[:2] = np.inf, np.nan
    found = scores.transform(row)
    assert found[0] == 4.0
    assert np.isnan(found[1])
    assert np.isfinite(found[2:]).all()
    row[3] = -0.5 if scores.table.scale == "log" else -np.inf
    with pytest.raises(ValueError, match="first in row 3"):
        scores.transform(row)
    with pytest.raises(ValueError, match="one value for each of 2000 clients"):
        scores.transform(row[:5])


def test_hopelessly_large_losses_are_the_top_of_the_table(tabled):
    scores, losses = tabled
    row = losses[:, 0].copy()
    row[0] = 1e300
    assert scores.transform(row)[0] == pytest.approx(scores.fitted.transform(row)[0], abs=scores.bound)


def test_one_law_a_stream_needs_as_many_streams_as_laws_in_every_block_and_detector():
    level = np.linspace(0.0, 9.0, 70_000)
    pre, post = GaussianStreams(level, np.ones(70_000)), GaussianStreams(level + 1, np.ones(70_000))
    for detector in (ScoreCUSUM(pre=pre, post=post, multiplier=1.0, threshold=5.0), CUSUM(pre=pre, post=post, threshold=5.0)):
        assert_allclose(detector.step(detector.init(70_000), level + 1).statistic, 0.5, rtol=0, atol=1e-9)
        with pytest.raises(ValueError, match="each of 70000 streams, got a state of 2"):
            detector.step(detector.init(2), np.zeros(2))


def test_observations_of_another_shape_than_the_laws_are_refused():
    detector = ScoreCUSUM(pre=Quartic(1.0, 2), post=Quartic(0.2, 2), multiplier=0.5, threshold=5.0)
    with pytest.raises(ValueError, match="shape"):
        detector.step(detector.init(2), np.array([1.0, 1.5]))


def test_an_observation_whose_scores_overflow_is_refused_and_never_taken_for_quiet():
    detector = ScoreCUSUM(pre=Quartic(1.0, 2), post=Quartic(0.5, 2), multiplier=0.1, threshold=5.0)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="overflow, the first is stream 1"):
        detector.step(detector.init(2), np.array([[1.0, 1.0], [1e200, 1.0]]))
