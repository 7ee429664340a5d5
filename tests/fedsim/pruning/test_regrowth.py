"""Regrowth: exact gate gradients of removed structures, losses that fall, and what it ships."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.llm.structures import language_structures
from fedsim.pruning import GISP, Random, Submodel, lacking, regrown, structure_map
from fedsim.pruning.importance import gate_gradients
from fedsim.pruning.structures import COSTS
from tests.fedsim.llm.models import TOKENS, built, tokens


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")


def case(seed: int = 0) -> tuple[nn.Module, list[Batch]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)).double()
        inputs = torch.randn(64, 6, dtype=torch.float64)
        targets = (inputs[:, :4] @ torch.randn(4, 4, dtype=torch.float64)).argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        losses(model, Batch(inputs, targets)).mean().backward()
        optimiser.step()
    return model, [Batch(inputs[:40], targets[:40]), Batch(inputs[40:], targets[40:])]


def test_the_gradient_of_a_closed_gate_is_the_slope_of_the_loss_when_it_opens():
    model, batches = case()
    smap = structure_map(model, batches[0].inputs[:1])
    kept = np.random.default_rng(0).random(len(smap)) < 0.6
    found = gate_gradients(model, smap, losses, batches, kept)
    for s in np.flatnonzero(~kept):
        block = int(smap.block_of[s])
        consumer = model[2 * (block + 1)]
        values = []
        for opened in (1e-5, -1e-5):
            gates = [torch.ones(12, dtype=torch.float64), torch.ones(10, dtype=torch.float64)]
            for b in range(2):
                gates[b][torch.from_numpy(~kept[smap.starts[b] : smap.starts[b + 1]])] = 0
            gates[block][s - smap.starts[block]] = opened
            hooks = [model[2 * (b + 1)].register_forward_pre_hook(lambda _, args, g=gates[b]: (args[0] * g,)) for b in range(2)]
            with torch.no_grad():
                values.append(float(torch.cat([losses(model, b) for b in batches]).mean()))
            for hook in hooks:
                hook.remove()
        assert consumer.in_features == len(gates[block])
        assert found[s] == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_swaps_lower_the_loss_at_no_larger_a_size_and_undo_a_bad_choice():
    model, batches = case()
    smap = structure_map(model, batches[0].inputs[:1])
    pruner = GISP(levels=(0.5,), steps=5)
    bad = Random(levels=(0.5,), seed=1).trajectory(model, smap, losses, batches).at(0.5)
    found = regrown(pruner, model, smap, losses, batches, bad, rounds=10)
    assert list(found.losses) == sorted(found.losses, reverse=True)
    assert len(set(found.losses)) == len(found.losses) > 1
    assert 0.95 * bad.parameters(smap) < found.submodel.parameters(smap) <= bad.parameters(smap)
    with torch.no_grad():
        small = found.submodel.sliced(model, smap)
        assert torch.cat([losses(small, b) for b in batches]).mean() == pytest.approx(found.losses[-1], rel=1e-9)
    assert lacking(bad, found.submodel, smap) < lacking(None, found.submodel, smap)
    again = regrown(pruner, model, smap, losses, batches, found.submodel, rounds=10)
    assert again.losses[0] == found.losses[-1]


def test_no_cost_grows_where_layers_cross():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16, 16)]
        first, second, third, fourth = (nn.Sequential(c, nn.ReLU()) for c in convolutions)
        net = nn.Sequential(first, second, nn.MaxPool2d(2), third, fourth, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        batch = Batch(torch.randn(32, 3, 16, 16), torch.randint(0, 4, (32,)))
    smap = structure_map(net, batch.inputs[:1])
    kept = np.ones(len(smap), np.bool_)
    kept[np.random.default_rng(1).permutation(len(smap))[:30]] = False
    start = Submodel(kept, smap.fingerprint)
    found = regrown(GISP(levels=(0.3,)), net, smap, losses, [batch], start, rounds=8, share=0.5)
    assert (found.submodel.kept != start.kept).any()
    for cost in COSTS:
        assert found.submodel.cost(cost, smap) <= start.cost(cost, smap)


def test_nothing_is_swapped_where_nothing_pays():
    model, batches = case()
    smap = structure_map(model, batches[0].inputs[:1])
    dense = Submodel.dense(smap)
    assert regrown(GISP(levels=(0.5,)), model, smap, losses, batches, dense).submodel.kept.all()
    protected = GISP(levels=(0.0,), protect=("0", "2"))
    bad = Random(levels=(0.5,), seed=1).trajectory(model, smap, losses, batches).at(0.5)
    assert regrown(protected, model, smap, losses, batches, bad).submodel.kept.tolist() == bad.kept.tolist()


def test_language_models_regrow_head_groups_for_head_groups():
    model = built("llama")
    smap = language_structures(model, TOKENS)

    def next_token(live, batch):
        return F.cross_entropy(live(batch.inputs).logits.transpose(1, 2), batch.targets, reduction="none").mean(1)

    batches = [Batch(tokens(4), tokens(4).roll(-1, 1))]
    start = Random(levels=(0.4,), seed=2).trajectory(model, smap, next_token, batches).at(0.4)
    found = regrown(GISP(levels=(0.4,)), model, smap, next_token, batches, start, rounds=6)
    heads = np.array([b.kind == "head_group" for b in smap.blocks])[smap.block_of]
    assert found.submodel.kept[heads].sum() == start.kept[heads].sum()
    assert found.submodel.kept[~heads].sum() == start.kept[~heads].sum()
    assert found.losses[-1] < found.losses[0]
    assert (np.add.reduceat(found.submodel.kept, smap.starts[:-1]) != np.add.reduceat(start.kept, smap.starts[:-1])).any(), "across layers"
    assert all(found.submodel.cost(cost, smap) == start.cost(cost, smap) for cost in COSTS)


def test_bad_input_is_refused():
    model, batches = case()
    smap = structure_map(model, batches[0].inputs[:1])
    with pytest.raises(ValueError, match="calibration needs at least one example"):
        regrown(GISP(), model, smap, losses, [], Submodel.dense(smap))
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        regrown(GISP(), model, smap, losses, batches, Submodel.dense(smap), rounds=0)
    with pytest.raises(ValueError, match="used with the structure map of model"):
        regrown(GISP(), model, smap, losses, batches, Submodel(np.ones(22, bool), "another"))
