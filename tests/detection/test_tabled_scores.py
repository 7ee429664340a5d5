import time

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from detection import NormalScores
from detection.tabled_scores import TabledScores


def fleet(clients=20_000, values=50, seed=0):
    """Losses of many scales, calibrated."""
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(0.0, 1.0, clients)
    fitted = NormalScores().fit(scale[:, None] * rng.gamma(0.7, 1.0, (clients, values)))
    return fitted, lambda factor=1.0: factor * scale * rng.gamma(0.7, 1.0, clients)


@pytest.mark.parametrize("factor", [1e-6, 0.1, 1.0, 3.0, 1e4])
def test_no_score_differs_from_the_exact_one_by_more_than_the_bound(factor):
    fitted, draw = fleet()
    table = TabledScores.of(fitted)
    losses = draw(factor)
    error = np.abs(table.transform(losses) - fitted.transform(losses))
    assert table.bound < 0.1
    assert error.max() <= table.bound


def test_the_error_in_control_is_a_ten_thousandth():
    fitted, draw = fleet()
    table = TabledScores.of(fitted)
    assert table.table.gain.dtype == np.float32
    errors = np.concatenate([table.transform(losses) - fitted.transform(losses) for losses in (draw() for _ in range(10))])
    assert np.sqrt(np.mean(errors**2)) < 3e-4
    assert abs(errors.mean()) < 2e-5


def test_the_bound_is_honest_for_a_small_pool_whose_scores_jump():
    rng = np.random.default_rng(1)
    fitted = NormalScores().fit(rng.lognormal(size=(4, 30)))
    table = TabledScores.of(fitted)
    grid = np.exp(np.linspace(-6, 6, 4001))
    for client in range(4):
        for losses in np.tile(grid[:, None], 4):
            losses[np.arange(4) != client] = 1.0
        pairs = [(table.transform(np.full(4, loss))[client], fitted.transform(np.full(4, loss))[client]) for loss in grid[::40]]
        assert max(abs(a - b) for a, b in pairs) <= table.bound


def test_broken_missing_and_zero_losses_are_treated_as_by_the_exact_scores():
    fitted, draw = fleet(clients=40_000)
    losses = draw()
    losses[[0, 17_000, 39_999]] = [np.inf, np.nan, 0.0]
    tabled, exact = TabledScores.of(fitted).transform(losses), fitted.transform(losses)
    assert_array_equal(np.isnan(tabled), np.isnan(exact))
    assert tabled[0] == fitted.config.clip
    assert tabled[39_999] == pytest.approx(exact[39_999], abs=1e-3)


@pytest.mark.parametrize("far", [0.0, 1e7])
def test_signals_of_any_sign_and_place_keep_the_bound(far):
    rng = np.random.default_rng(2)
    place = far + rng.normal(0.0, 5.0, 500)
    fitted = NormalScores(scale="identity").fit(place[:, None] + rng.standard_normal((500, 100)))
    table = TabledScores.of(fitted)
    x = place + rng.standard_normal(500)
    assert np.abs(table.transform(x) - fitted.transform(x)).max() <= table.bound
    assert_array_equal(table.transform(np.full(500, 1e300)), np.full(500, table.table.values[-1]))


@pytest.mark.parametrize("unit", [1e-290, 1e30, 1.0])
def test_logarithms_are_in_single_precision_only_where_that_is_enough(unit):
    rng = np.random.default_rng(3)
    losses = unit * np.exp(10.0 + 1e-6 * rng.standard_normal((50, 80))) if unit == 1.0 else unit * rng.lognormal(size=(50, 80))
    fitted = NormalScores().fit(losses)
    table = TabledScores.of(fitted)
    assert (table.table.gain.dtype == np.float32) == (unit == 1e30)
    assert np.abs(table.transform(losses[:, 3]) - fitted.transform(losses[:, 3])).max() <= table.bound


def test_scores_are_written_where_asked_and_losses_stay_untouched():
    fitted, draw = fleet(clients=100)
    losses, out = draw(), np.empty(100)
    before = losses.copy()
    table = TabledScores.of(fitted)
    assert table.transform(losses, out) is out
    assert_array_equal(out, table.transform(losses))
    assert_array_equal(losses, before)


def test_a_clients_score_does_not_depend_on_its_neighbours():
    fitted, draw = fleet(clients=20_000)
    losses = draw()
    table = TabledScores.of(fitted)
    whole = table.transform(losses)
    order = np.random.default_rng(4).permutation(20_000)
    shuffled = TabledScores.of(_reordered(fitted, order)).transform(losses[order])
    assert_allclose(shuffled, whole[order], rtol=0, atol=0)


def test_a_million_losses_take_a_small_part_of_the_exact_transforms_time():
    fitted, draw = fleet(clients=100_000, values=20)
    losses, out = draw(), np.empty(100_000)
    table = TabledScores.of(fitted)

    def seconds(act):
        times = []
        for _ in range(5):
            start = time.thread_time()
            act()
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(lambda: table.transform(losses, out)) < 0.15 * seconds(lambda: fitted.transform(losses))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda table: table.transform(np.r_[np.ones(99), -1.0]), "1 losses are negative.*row 99"),
        (lambda table: table.transform(np.r_[-1e-300, np.ones(99)]), "are negative.*row 0"),
        (lambda table: table.transform(np.r_[np.ones(99), -np.inf]), "are negative"),
        (lambda table: table.transform(np.ones(99)), "each of 100 clients"),
        (lambda table: table.transform(np.ones((100, 2))), "each of 100 clients"),
        (lambda table: TabledScores.of(table.fitted, cells=4), "cells must be at least 16"),
    ],
)
def test_bad_losses_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(TabledScores.of(fleet(clients=100)[0]))


def _reordered(fitted, order):
    from dataclasses import replace

    columns = {name: getattr(fitted, name)[order] for name in ("location", "deviation", "counts", "down_weighted")}
    return replace(fitted, **columns)
