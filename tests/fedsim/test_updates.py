"""The fold: one tree, whatever computes its nodes; means over those who hold a coordinate."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fedsim.updates import Partial, Update, leaf, mean, normalised, tree_sum


def leaves(values, weights):
    return [leaf(Update(v, float(w))) for v, w in zip(values, weights, strict=True)]


@pytest.fixture
def fifty():
    rng = np.random.default_rng(0)
    return leaves(rng.normal(size=(50, 200)).astype(np.float32), normalised(rng.random(50)))


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 10.0)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_mean_agrees_with_exactly_rounded_summation(pairs):
    values, raw = (np.array(column) for column in zip(*pairs, strict=True))
    weights = normalised(raw)
    root = tree_sum(leaves(values[:, None], weights))
    exact = math.fsum(w * v for w, v in zip(weights, values, strict=True))
    assert_allclose(mean(root, np.zeros(1)), exact, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64])
def test_aligned_units_of_a_power_of_two_give_the_bits_of_the_whole_fold(fifty, size):
    nodes = [tree_sum(fifty[i : i + size]) for i in range(0, len(fifty), size)]
    assert_array_equal(tree_sum(nodes).total, tree_sum(fifty).total)


def test_unaligned_units_and_another_order_change_bits(fifty):
    whole = tree_sum(fifty).total
    unaligned = tree_sum([tree_sum(fifty[i : i + 10]) for i in range(0, 50, 10)]).total
    assert (unaligned != whole).any()
    assert (tree_sum(fifty[::-1]).total != whole).any()


def test_a_single_uploader_gets_its_own_model_back(fifty):
    x = np.random.default_rng(1).normal(size=100).astype(np.float32)
    root = tree_sum(leaves([x], normalised([17.0])))
    assert_array_equal(mean(root, np.zeros(100, np.float32)), x)


@pytest.mark.parametrize(("weights", "expected"), [((1, 1, 1), (2, 1.5, 1, 1)), ((10, 20, 30), (7 / 3, 5 / 3, 1, 1))])
def test_a_coordinate_is_averaged_over_those_who_hold_it(weights, expected):
    held = [np.arange(4) < count for count in (4, 2, 1)]
    updates = [Update(np.full(4, float(v)), w, h) for v, w, h in zip((1, 2, 3), normalised(weights), held, strict=True)]
    assert_allclose(mean(tree_sum([leaf(u) for u in updates]), np.zeros(4)), expected, rtol=1e-15)


def test_where_all_hold_everything_coverage_changes_no_bit(fifty):
    rng = np.random.default_rng(2)
    values, weights = rng.normal(size=(7, 30)), normalised(rng.random(7))
    full = [leaf(Update(v, float(w), np.ones(30, bool))) for v, w in zip(values, weights, strict=True)]
    assert_array_equal(mean(tree_sum(full), np.zeros(30)), mean(tree_sum(leaves(values, weights)), np.zeros(30)))


def test_a_coordinate_nobody_holds_keeps_its_value():
    before = np.array([0.1, 0.2, 0.3])
    root = tree_sum([leaf(Update(np.ones(3), 1.0, np.array([True, False, False])))])
    assert_array_equal(mean(root, before), [1.0, 0.2, 0.3])


def test_partly_and_wholly_held_updates_mix():
    root = tree_sum([Partial(np.array([1.0, 1.0]), 0.5), leaf(Update(np.array([4.0, 9.0]), 0.5, np.array([True, False])))])
    assert_array_equal(mean(root, np.zeros(2)), [3.0, 2.0])


def test_half_precision_is_folded_in_single():
    halves = leaves(np.ones((3, 2), np.float16), normalised([1, 1, 1]))
    assert tree_sum(halves).total.dtype == np.float32
    assert mean(tree_sum(halves), np.zeros(2, np.float16)).dtype == np.float16


@pytest.mark.parametrize("weights", [[0.0, 0.0], [np.nan, 1.0], [-1.0, 2.0], [np.inf, 1.0]])
def test_weights_without_a_mean_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        normalised(weights)


def test_empty_coverage_is_refused():
    with pytest.raises(ValueError, match="coverage is empty"):
        Update(np.ones(2), 1.0, np.zeros(2, bool))
