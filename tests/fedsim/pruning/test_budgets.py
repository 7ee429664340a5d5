"""Budgets against the real module: parameters in memory, caches, FLOPs counted by torch."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedsim.errors import CapacityError
from fedsim.llm.structures import language_structures
from fedsim.pruning import Random
from fedsim.pruning.budgets import Flops, Memory, Seconds
from tests.fedsim.llm.models import FAMILIES, TOKENS, built, tokens


def prepared(name="llama"):
    model = built(name)
    model.set_attn_implementation("eager")
    smap = language_structures(model, TOKENS)
    return model, smap, Random(levels=(0.6,)).trajectory(model, smap, None, [(tokens(),)])


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_and_memory_at_other_lengths_are_those_of_the_real_module(name):
    model, smap, trajectory = prepared(name)
    for level in (0.0, 0.5):
        submodel = trajectory.at(level)
        removed, small = smap.removed_counts(submodel.kept), submodel.sliced(model, smap)
        for length in (5, 20):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                small(tokens(2, length))
            assert Flops(tokens=length, batch=2)(smap, removed) == counter.get_total_flops()
        with torch.no_grad():
            output = small(tokens(2, 9), use_cache=True)
            cache = getattr(output, "cache", None) or output.past_key_values
            with FlopCounterMode(display=False) as counter:
                small(tokens(2, 1), cache=cache, use_cache=True)
        assert Flops(tokens=10, batch=2, phase="decode")(smap, removed) == counter.get_total_flops()
        held = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
        weights = sum(4 * p.numel() for p in small.parameters())
        assert Memory(context=10, batch=2)(smap, removed) == weights + held


def test_the_largest_submodel_within_a_budget_is_found():
    _, smap, trajectory = prepared()
    counts = np.concatenate([np.zeros((1, 6), np.int64), smap.after_each(np.ones(len(smap), bool), trajectory.removed)])
    for cost in ("bytes", "kv_bytes", Memory(context=50), Flops(tokens=7), Seconds(flops_per_second=1e9, bytes_per_second=1e8, tokens=30)):
        figures = smap.cost(cost, counts) if isinstance(cost, str) else cost(smap, counts)
        assert (np.diff(figures) <= 0).all()
        for limit in np.quantile(figures, [0.1, 0.5, 0.9]):
            submodel = trajectory.within(float(limit), smap, cost)
            number = int((~submodel.kept).sum())
            assert figures[number] <= limit
            assert number == 0 or figures[number - 1] > limit
        with pytest.raises(CapacityError, match="over the limit of"):
            trajectory.within(float(figures.min()) * 0.9, smap, cost)
    assert trajectory.within(1e12, smap).kept.all()


def test_no_submodel_is_larger_than_the_one_the_trajectory_went_on_from():
    model, smap, trajectory = prepared()
    start = trajectory.at(0.3)
    further = Random(levels=(0.6,), seed=1).trajectory(model, smap, None, [(tokens(),)], start=start)
    held = start.bytes(smap)
    np.testing.assert_array_equal(further.within(1e12, smap).kept, start.kept)
    assert further.within(held - 1, smap).bytes(smap) < held
    fits = further.within(0.9 * held, smap)
    assert 0.8 * held < fits.bytes(smap) <= 0.9 * held
    assert not (fits.kept & ~start.kept).any()


def test_figures_along_an_order_are_those_of_all_counts_at_once():
    _, smap, trajectory = prepared()
    sizes: list[int] = []

    def bytes_left(removed):
        sizes.append(len(removed))
        return smap.cost("bytes", removed)

    found = smap.along(trajectory.removed, bytes_left, at_once=7)
    np.testing.assert_array_equal(found, smap.cost("bytes", smap.after_each(np.ones(len(smap), bool), trajectory.removed)))
    assert max(sizes) == 7
    assert smap.along(trajectory.removed[:0], bytes_left).shape == (0,)


def test_a_roofline_is_bound_by_compute_or_by_memory():
    _, smap, _ = prepared()
    none = np.zeros(len(smap.blocks), np.int64)
    flops, read = Flops(tokens=30, phase="decode")(smap, none), Memory(context=30)(smap, none)
    assert Seconds(flops_per_second=1.0, bytes_per_second=1e18, tokens=30)(smap, none) == flops
    assert Seconds(flops_per_second=1e18, bytes_per_second=1.0, tokens=30)(smap, none) == read
    for fields, message in (
        ({"flops_per_second": 0.0}, "flops_per_second must be positive"),
        ({"tokens": 0}, "tokens must be a whole number"),
        ({"phase": "both"}, "phase must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Seconds(**{"flops_per_second": 1.0, "bytes_per_second": 1.0, "tokens": 1, **fields})
    with pytest.raises(ValueError, match="batch must be a whole number"):
        Memory(batch=0)
