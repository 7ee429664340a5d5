import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.spatial.distance import cdist

from detection.scan_b import ScanB


def kernel(x, y, bandwidth):
    return np.exp(-(cdist(x, y) ** 2) / (2 * bandwidth**2))


def discrepancy(x, y, bandwidth):
    """Unbiased squared MMD of two blocks (B, d) whose observations are paired: the mean of ``h`` over pairs ``i != j``."""
    total = kernel(x, x, bandwidth) + kernel(y, y, bandwidth) - kernel(x, y, bandwidth) - kernel(y, x, bandwidth)
    np.fill_diagonal(total, 0.0)
    return total.sum() / (len(x) * (len(x) - 1))


def history(scan, x):
    state, statistic = scan.init(len(x)), np.empty(x.shape[:2])
    for tick in range(x.shape[1]):
        state = scan.step(state, x[:, tick])
        statistic[:, tick] = scan.statistic(state)
    return statistic, state


@pytest.mark.parametrize("dimension", [1, 3])
@pytest.mark.parametrize("block", [2, 7])
def test_the_recursion_gives_the_mean_discrepancy_of_the_newest_block_at_every_tick(dimension, block):
    rng = np.random.default_rng(dimension)
    scan = ScanB(reference=rng.standard_normal((4, block, dimension)), bandwidth=1.3, deviation=0.1, threshold=3.0)
    x = rng.standard_normal((5, 4 * block, dimension)) + np.linspace(0, 2, 4 * block)[:, None]
    statistic, _ = history(scan, x if dimension > 1 else x[..., 0])
    assert_array_equal(statistic[:, : block - 1], 0.0)
    for row in range(5):
        for t in range(block, 4 * block + 1):
            newest = np.empty((block, dimension))
            newest[np.arange(t - block, t) % block] = x[row, t - block : t]  # an observation keeps its partner while it stays
            expected = np.mean([discrepancy(y, newest, 1.3) for y in scan.reference]) / 0.1
            assert statistic[row, t - 1] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("block", "blocks"), [(10, 5), (20, 1)])
def test_the_deviation_is_that_of_simulated_discrepancies(block, blocks):
    rng = np.random.default_rng(0)
    scan = ScanB.fit(rng.standard_normal(1000), threshold=3.0, rng=rng, block=block, blocks=blocks)
    draws = []
    for _ in range(1200):
        newest = rng.standard_normal((block, 1))
        draws.append(np.mean([discrepancy(rng.standard_normal((block, 1)), newest, scan.bandwidth) for _ in range(blocks)]))
    assert scan.deviation == pytest.approx(np.std(draws), rel=0.1)
    assert abs(np.mean(draws)) < 4 * scan.deviation / np.sqrt(len(draws))


def test_the_bandwidth_is_the_median_distance():
    pool, rng = np.random.default_rng(1).standard_normal((200, 2)), np.random.default_rng(2)
    scan = ScanB.fit(pool, threshold=3.0, rng=rng, block=10, blocks=3)
    distances = cdist(pool, pool)[~np.eye(200, dtype=bool)]
    assert scan.bandwidth == pytest.approx(np.sqrt(np.median(distances**2)), rel=1e-12)
    assert {tuple(point) for point in scan.reference.reshape(-1, 2)} <= {tuple(point) for point in pool}
    assert len({tuple(point) for point in scan.reference.reshape(-1, 2)}) == 30


@pytest.mark.parametrize("moved", [lambda x: 3.0 * x, lambda x: x + 1.5, lambda x: 0.2 * x])
def test_a_mean_or_a_variance_that_changes_is_seen(moved):
    rng = np.random.default_rng(3)
    scan = ScanB.fit(rng.standard_normal(1000), threshold=6.0, rng=rng, block=40, blocks=10)
    x = rng.standard_normal((30, 240))
    x[:, 160:] = moved(x[:, 160:])
    statistic, state = history(scan, x)
    assert (statistic[:, :160] < 6.0).all()
    assert (statistic[:, -1] >= 6.0).mean() > 0.9
    assert_array_equal(scan.changed_at(state), 201)


def test_the_change_is_not_placed_before_the_stream():
    scan = ScanB(reference=np.zeros((1, 5, 1)), bandwidth=1.0, deviation=1.0, threshold=1.0)
    assert_array_equal(scan.changed_at(scan.step(scan.init(2), [0.0, 0.0])), 1)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (np.zeros(200), "median distance"),
        (np.arange(99.0), "block \\* blocks"),
        (np.full(200, np.nan), "finite"),
        (np.zeros((5, 5, 5)), "finite observations"),
    ],
)
def test_a_reference_that_says_nothing_is_refused(reference, message):
    with pytest.raises(ValueError, match=message):
        ScanB.fit(reference, threshold=3.0, rng=np.random.default_rng(0))


@pytest.mark.parametrize("setting", [{"reference": np.zeros((3, 1, 2))}, {"bandwidth": 0.0}, {"deviation": np.inf}, {"threshold": -1.0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ScanB(**{"reference": np.zeros((3, 4, 2)), "bandwidth": 1.0, "deviation": 1.0, "threshold": 1.0} | setting)


def test_observations_of_another_dimension_are_refused():
    scan = ScanB(reference=np.zeros((3, 4, 2)), bandwidth=1.0, deviation=1.0, threshold=1.0)
    with pytest.raises(ValueError, match="2 numbers"):
        scan.step(scan.init(2), [0.0, 0.0])
