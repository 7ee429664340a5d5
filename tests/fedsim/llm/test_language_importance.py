"""Importance on language models: identities, finite differences, brute force, and the same order however it is computed."""

import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from fedsim.errors import CapacityError
from fedsim.llm.structures import language_structures
from fedsim.pruning import GISP, FirstOrder, StructureMap, Submodel
from fedsim.pruning.gates import gated
from tests.fedsim.llm.models import FAMILIES, TOKENS, VOCABULARY, built, tokens


class Batch(NamedTuple):
    inputs: Tensor


def losses(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.inputs).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch.inputs[:, 1:], reduction="none").mean(1)


def scores(model: nn.Module, batches, kept=None, **fields):
    smap = language_structures(model, TOKENS)
    kept = np.ones(len(smap), np.bool_) if kept is None else kept
    return FirstOrder(**{"normalise": "none", **fields}).scores(model, smap, losses, batches, kept)


def trained(seed: int = 0) -> nn.Module:
    """A small Llama that has learned a language of 50 words: each follows from the two before it."""
    model = built("llama", seed=seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(600):
        optimiser.zero_grad()
        losses(model, Batch(sentences(32, step))).mean().backward()
        optimiser.step()
    return model


def sentences(number: int, seed: int) -> Tensor:
    words = torch.randint(0, VOCABULARY, (number, TOKENS), generator=torch.Generator().manual_seed(seed))
    for t in range(2, TOKENS):
        words[:, t] = torch.where(words[:, t] < 10, words[:, t], (3 * words[:, t - 1] + words[:, t - 2]) % VOCABULARY)
    return words


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gate_gradient_is_the_slope_of_the_loss_when_a_structure_is_scaled(name):
    model, batch = built(name, torch.float64), Batch(tokens())
    smap = language_structures(model, TOKENS)
    found = scores(model, [batch], aggregate="gate", reduce="mean_then_abs")
    h = 1e-4 if name in ("opt", "gpt2") else 1e-2  # the norms of the others compute in float32
    for s in range(0, len(smap), 7):
        near, far = (_loss_when_scaled(model, smap, s, 1 + d, batch) - _loss_when_scaled(model, smap, s, 1 - d, batch) for d in (h, 2 * h))
        assert found[s] == pytest.approx(abs(8 * near - far) / (12 * h), rel=1e-3, abs=1e-6)


def _loss_when_scaled(model: nn.Module, smap: StructureMap, structure: int, factor: float, batch: Batch) -> float:
    scaled = copy.deepcopy(model)
    for piece in smap.slices(structure):
        if piece.role == "consumer":
            weight, columns = scaled.get_parameter(piece.parameter).data, torch.tensor(piece.indices)
            weight.index_copy_(piece.dim, columns, factor * weight.index_select(piece.dim, columns))
    with torch.no_grad():
        return float(losses(scaled, batch).mean())


def test_weight_times_gradient_of_the_values_and_of_the_columns_that_read_them_is_the_gate_gradient():
    model, batch = built("llama", torch.float64), Batch(tokens())
    smap = language_structures(model, TOKENS)
    gates = scores(model, [batch], aggregate="gate", reduce="mean_then_abs")
    losses(model, batch).mean().backward()
    for s in range(4):
        for name in ("v_proj", "o_proj"):
            piece = next(p for p in smap.slices(s) if name in p.parameter)
            weight = model.get_parameter(piece.parameter)
            product = (weight * weight.grad).index_select(piece.dim, torch.tensor(piece.indices)).sum()
            assert abs(float(product.detach())) == pytest.approx(gates[s], rel=1e-5)  # its norms compute in float32


def test_a_norm_over_each_head_makes_queries_scale_free():
    model, batch = built("qwen3, wide heads", torch.float64), Batch(tokens())
    losses(model, batch).mean().backward()
    weight = model.model.layers[1].self_attn.q_proj.weight
    by_head = (weight * weight.grad).view(4, -1)
    assert by_head.sum(1).abs().max() < 1e-6 * by_head.abs().sum(1).min()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "fields", [{}, {"aggregate": "sum_squares"}, {"aggregate": "taylor2"}, {"reduce": "abs_then_mean"}, {"aggregate": "gate"}]
)
def test_cutting_out_what_is_removed_scores_as_silencing_it_does(name, fields):
    model, batches = built(name, torch.float64), [Batch(tokens(2, seed=1)), Batch(tokens(2, seed=2))]
    smap = language_structures(model, TOKENS)
    kept = np.random.default_rng(0).random(len(smap)) < 0.6
    kept[smap.starts[:-1]] = True
    silenced, cut = (scores(model, batches, kept, compact=compact, **fields)[kept] for compact in (False, True))
    np.testing.assert_allclose(cut, silenced, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_of_removal_is_the_same_cut_out_or_silenced(name):
    model, batches = built(name), [Batch(tokens(4, seed=1))]
    smap = language_structures(model, TOKENS)
    orders = [
        GISP(levels=(0.6,), steps=6, importance=FirstOrder(compact=compact)).trajectory(model, smap, losses, batches).removed
        for compact in (False, True)
    ]
    np.testing.assert_array_equal(*orders)


@pytest.mark.parametrize("fields", [{}, {"aggregate": "taylor2"}, {"reduce": "abs_then_mean"}])
def test_weights_that_take_turns_give_the_same_bits(fields):
    model, batches = built("gpt2"), [Batch(tokens(2, seed=1)), Batch(tokens(3, seed=2))]
    at_once, in_turns = (scores(model, batches, gradient_bytes=most, **fields) for most in (None, 5_000))
    np.testing.assert_array_equal(at_once, in_turns)


def test_one_gradient_at_a_time_is_in_memory_with_a_single_batch():
    model = built("llama")
    smap = language_structures(model, TOKENS)
    held: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in model.parameters())))
    FirstOrder().scores(model, smap, losses, [Batch(tokens())], np.ones(len(smap), np.bool_))
    assert len(held) == 21
    assert max(held) == 1
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_scores_are_those_of_the_mean_gradient_written_out():
    model, batches = built("qwen2", torch.float64), [Batch(tokens(2, seed=1)), Batch(tokens(3, seed=2))]
    smap = language_structures(model, TOKENS)
    (sum(losses(model, b).sum() for b in batches) / 5).backward()
    expected = np.zeros(len(smap))
    for s in range(len(smap)):
        for piece in smap.slices(s):
            weight = model.get_parameter(piece.parameter)
            expected[s] += (weight * weight.grad).abs().index_select(piece.dim, torch.tensor(piece.indices)).sum().item()
    model.zero_grad()
    np.testing.assert_allclose(scores(model, batches), expected, rtol=1e-6)  # its norms compute in float32


@pytest.mark.slow
def test_scores_rank_structures_as_removing_each_of_them_does():
    model, batch = trained(), Batch(sentences(64, 1000))
    smap = language_structures(model, TOKENS)
    found = scores(model, [batch])
    with torch.no_grad():
        dense = float(losses(model, batch).mean())
        harm = np.empty(len(smap))
        for s in range(len(smap)):
            kept = np.ones(len(smap), np.bool_)
            kept[s] = False
            with gated(model, smap, kept, record=False):
                harm[s] = float(losses(model, batch).mean()) - dense
    heads = np.array([b.kind == "head_group" for b in smap.blocks])[smap.block_of]
    assert spearmanr(found[heads], harm[heads]).statistic >= 0.9
    assert spearmanr(found[~heads], harm[~heads]).statistic >= 0.5
    shuffled = np.random.default_rng(0).permutation(found[~heads])
    assert abs(spearmanr(shuffled, harm[~heads]).statistic) < 0.3


def test_rescaling_a_channel_does_not_change_its_importance():
    model, batch = built("llama", torch.float64), Batch(tokens())
    before = scores(model, [batch])
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight.data[5] *= 7
    mlp.down_proj.weight.data[:, 5] /= 7
    np.testing.assert_allclose(scores(model, [batch]), before, rtol=1e-5)


def test_going_on_from_a_prefix_gives_the_trajectory_that_was_not_interrupted():
    model, batches = built("llama"), [Batch(tokens(4))]
    smap = language_structures(model, TOKENS)
    pruner = GISP(levels=(0.3, 0.6), steps=6)
    whole = pruner.trajectory(model, smap, losses, batches)
    prefix = np.ones(len(smap), np.bool_)
    prefix[whole.removed[whole.step_of <= 3]] = False
    rest = pruner.trajectory(model, smap, losses, batches, start=Submodel(prefix, smap.fingerprint))
    np.testing.assert_array_equal(rest.removed[rest.step_of > 0], whole.removed[whole.step_of > 3])
    np.testing.assert_array_equal(rest.scores[rest.step_of > 0], whole.scores[whole.step_of > 3])
    assert rest.at(0.6) == whole.at(0.6)
    with pytest.raises(CapacityError, match=r"lies before the trajectory, which goes on from 0\.3"):
        rest.at(0.1)


@pytest.mark.parametrize("units", [("head_group", "channel"), ("layer",)])
def test_absolute_values_are_taken_of_texts_where_a_layer_lays_all_tokens_side_by_side(units):
    model = built("opt")
    smap = language_structures(model, TOKENS, units=units)
    method, every = FirstOrder(aggregate="gate", reduce="abs_then_mean", normalise="none", compact=False), np.ones(len(smap), np.bool_)
    single = [replace(method, reduce="mean_then_abs").scores(model, smap, losses, [Batch(tokens()[i : i + 1])], every) for i in range(3)]
    np.testing.assert_allclose(method.scores(model, smap, losses, [Batch(tokens())], every), np.mean(single, axis=0), rtol=1e-3)
