"""Published pruning rules against their formulas written out."""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.llm.structures import language_structures
from fedsim.pruning import FLAP, GISP, FirstOrder, LLMPruner, Random, ShortGPT, Submodel, Uniform, WandaSP, compensate, structure_map
from fedsim.pruning.activations import moments
from tests.fedsim.llm.models import TOKENS, built, gpt2, tokens


class Batch(NamedTuple):
    inputs: Tensor


def losses(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.inputs).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch.inputs[:, 1:], reduction="none").mean(1)


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.inputs).flatten(1).square().mean(1)


BATCHES = [Batch(tokens(3, seed=1)), Batch(tokens(2, seed=2))]


def read_by(model: nn.Module, name: str, batches=BATCHES) -> Tensor:
    """All inputs (n, F) of a projection."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch.inputs)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_moments_are_those_of_all_inputs_at_once(name):
    model = built(name)
    smap = language_structures(model, TOKENS)
    found = moments(model, smap, losses, BATCHES)
    assert len(found) == len(smap.blocks)
    for weight, seen in found.items():
        inputs = read_by(model, weight.removesuffix(".weight"))
        assert seen.number == len(inputs) == 5 * TOKENS
        torch.testing.assert_close(seen.mean, inputs.mean(0))
        torch.testing.assert_close(seen.variance, inputs.var(0))
        torch.testing.assert_close(seen.norm, inputs.norm(dim=0))


def test_moments_of_convolutions_count_every_position():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(3 * 16, 2)).eval()
    pictures = Batch(torch.randn(5, 1, 8, 8))
    smap = structure_map(model, pictures.inputs[:1])
    found = moments(model, smap, squares, [pictures])["2.weight"]
    with torch.no_grad():
        torch.testing.assert_close(found.mean, model[:2](pictures.inputs).double().mean((0, 2, 3)))
    assert found.number == 5 * 36
    assert len(WandaSP(levels=(0.4,)).trajectory(model, smap, squares, [pictures]).removed)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_wanda_sp_takes_the_same_share_of_every_block_by_weight_times_input_norm(name):
    model = built(name)
    smap = language_structures(model, TOKENS)
    submodel = WandaSP(levels=(0.5,)).trajectory(model, smap, losses, BATCHES).at(0.5)
    for number, block in enumerate(smap.blocks):
        kept = submodel.kept[smap.starts[number] : smap.starts[number + 1]]
        assert abs(kept.mean() - 0.5) <= 1 / len(block)
        consumer = next(m for m in block.members if m.role == "consumer")
        inputs = read_by(model, consumer.weight.removesuffix(".weight"))
        weight = model.get_parameter(consumer.weight).detach().double()
        columns = weight if consumer.dim == 0 else weight.T
        score = np.array([sum(float(columns[c].abs().mean() * inputs[:, c].norm()) for c in row) for row in consumer.positions])
        np.testing.assert_array_equal(np.flatnonzero(~kept), np.sort(np.argsort(score, kind="stable")[: (~kept).sum()]))


def test_flap_ranks_standardised_fluctuation_over_the_whole_model():
    model = built("llama")
    smap = language_structures(model, TOKENS)
    standard = []
    for block in smap.blocks:
        consumer = next(m for m in block.members if m.role == "consumer")
        inputs = read_by(model, consumer.weight.removesuffix(".weight"))
        weight = model.get_parameter(consumer.weight).detach().double()
        raw = np.array([np.mean([float(inputs[:, c].var() * weight[:, c].norm() ** 2) for c in row]) for row in consumer.positions])
        standard.append((raw - raw.mean()) / raw.std(ddof=1))
    removed = FLAP(levels=(0.3,)).trajectory(model, smap, losses, BATCHES).removed
    expected = np.argsort(np.concatenate(standard), kind="stable")
    np.testing.assert_array_equal(removed[:10], expected[:10])


def test_a_bias_makes_up_exactly_for_inputs_that_never_change():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2, bias=False)).double().eval()
    model[0].weight.data[:3] = 0  # three units whose output is their bias, whatever comes in
    batch = Batch(torch.randn(20, 3, dtype=torch.float64))
    smap = structure_map(model, batch.inputs[:1])
    submodel = Submodel(np.arange(6) >= 3, smap.fingerprint)
    small = submodel.sliced(model, smap)
    assert not torch.allclose(small(batch.inputs), model(batch.inputs))
    compensate(small, model, smap, submodel, moments(model, smap, squares, [batch]))
    torch.testing.assert_close(small(batch.inputs), model(batch.inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_bias_keeps_the_mean_of_what_consumers_put_out(name):
    model = built(name)
    smap = language_structures(model, TOKENS)
    kept = np.ones(len(smap), np.bool_)
    kept[smap.starts[-2] : smap.starts[-2] + 5] = False  # channels of the last layer: nothing before them changes
    submodel = Submodel(kept, smap.fingerprint)
    small = submodel.sliced(model, smap)
    consumer = next(m for m in smap.blocks[-1].members if m.role == "consumer").weight.removesuffix(".weight")
    outputs: list[Tensor] = []
    compensate(small, model, smap, submodel, moments(model, smap, losses, BATCHES))
    for module in (model, small):
        handle = module.get_submodule(consumer).register_forward_hook(
            lambda _, args, out: outputs.append(out.detach().double().flatten(0, -2))
        )
        with torch.no_grad():
            for batch in BATCHES:
                module(batch.inputs)
        handle.remove()
    dense, cut = torch.cat(outputs[:2]), torch.cat(outputs[2:])
    torch.testing.assert_close(cut.mean(0), dense.mean(0), atol=1e-6, rtol=1e-4)
    assert not torch.allclose(cut, dense, atol=1e-4)


def test_llm_pruner_looks_once_at_single_examples():
    model = built("llama")
    smap = language_structures(model, TOKENS)
    found = LLMPruner(levels=(0.4,)).trajectory(model, smap, losses, BATCHES)
    total = np.zeros(len(smap))
    for batch in BATCHES:
        for i in range(len(batch.inputs)):
            single = FirstOrder(aggregate="sum_abs", reduce="mean_then_abs", normalise="none")
            total += single.scores(model, smap, losses, [Batch(batch.inputs[i : i + 1])], np.ones(len(smap), np.bool_))
    np.testing.assert_array_equal(found.removed, np.argsort(total, kind="stable")[: len(found.removed)])


def test_shortgpt_removes_the_layers_that_turn_their_input_least():
    model = gpt2(layers=6).eval()
    for layer in (1, 4):  # nearly the identity
        for projection in (model.transformer.h[layer].attn.c_proj, model.transformer.h[layer].mlp.c_proj):
            projection.weight.data *= 1e-3 * (layer + 1)
    smap = language_structures(model, TOKENS, units=("layer",))
    found = ShortGPT(levels=(0.5,)).trajectory(model, smap, losses, BATCHES)
    assert found.removed[:2].tolist() == [1, 4]
    small = found.at(0.34).sliced(model, smap)
    shallow = copy.deepcopy(model)
    shallow.transformer.h = nn.ModuleList([h for i, h in enumerate(model.transformer.h) if i not in (1, 4)])
    with torch.no_grad():
        biases = sum(
            model.transformer.h[i].attn.c_proj.bias.abs().sum() + model.transformer.h[i].mlp.c_proj.bias.abs().sum() for i in (1, 4)
        )
        assert biases == 0
        torch.testing.assert_close(small(tokens()).logits, shallow(tokens()).logits)
    with pytest.raises(ValueError, match=r"make it with units=\('layer',\)"):
        ShortGPT(levels=(0.3,)).trajectory(model, language_structures(model, TOKENS), losses, BATCHES)


def test_uniform_keeps_the_order_of_its_base_inside_every_block():
    model = built("llama")
    smap = language_structures(model, TOKENS)
    base = GISP(levels=(0.5,), steps=1)
    order = FirstOrder().scores(model, smap, losses, BATCHES, np.ones(len(smap), np.bool_))
    kept = Uniform(base=base, levels=(0.5,)).trajectory(model, smap, losses, BATCHES).at(0.5).kept
    for start, stop in zip(smap.starts[:-1], smap.starts[1:], strict=True):
        gone = ~kept[start:stop]
        assert abs(gone.mean() - 0.5) <= 1 / (stop - start)
        assert order[start:stop][gone].max() < order[start:stop][~gone].min()


class Asked(NamedTuple):
    inputs: Tensor
    targets: Tensor


def answered(model: nn.Module, batch: Asked) -> Tensor:
    logits = model(batch.inputs.flatten(0, -2)).logits
    found = F.cross_entropy(logits.transpose(1, 2), batch.targets.flatten(0, -2), reduction="none").sum(1)
    return found.view(len(batch.inputs), -1).mean(1)


def padded(batch: Asked, more: int) -> Asked:
    return Asked(F.pad(batch.inputs, (0, more), value=7), F.pad(batch.targets, (0, more), value=-100))


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["texts", "answers"])
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("method", [WandaSP, FLAP, ShortGPT])
def test_padding_is_no_data(method, name, shape):
    model = built(name)
    smap = language_structures(model, TOKENS, units=("layer",) if method is ShortGPT else ("head_group", "channel"))
    inputs = tokens(4).view(*shape, TOKENS)
    targets = inputs.roll(-1, -1)
    targets[..., :3] = -100  # questions are read, though not asked for
    batch = Asked(inputs, targets)
    tight, wide = (method(levels=(0.4,)).trajectory(model, smap, answered, [b]) for b in (batch, padded(batch, 30)))
    np.testing.assert_array_equal(tight.removed, wide.removed)
    np.testing.assert_allclose(tight.scores, wide.scores, rtol=1e-3)


def test_texts_end_where_their_own_targets_do():
    model = built("llama")
    smap = language_structures(model, TOKENS)
    batch = Asked(tokens(3), tokens(3).roll(-1, 1))
    for row, length in enumerate((5, 9, 12)):
        batch.targets[row, length:] = -100
    found = moments(model, smap, answered, [batch])
    for weight, seen in found.items():
        inputs = read_by(model, weight.removesuffix(".weight"), [batch]).view(3, TOKENS, -1)
        expected = torch.cat([row[:length] for row, length in zip(inputs, (5, 9, 12), strict=True)])
        assert seen.number == 26
        torch.testing.assert_close(seen.mean, expected.mean(0))
        torch.testing.assert_close(seen.variance, expected.var(0))


@pytest.mark.parametrize("method", [WandaSP, FLAP, ShortGPT])
def test_going_on_from_a_submodel_ranks_what_is_left_as_a_model_of_its_own(method):
    model = gpt2(layers=6).eval()
    smap = language_structures(model, TOKENS, units=("layer",) if method is ShortGPT else ("head_group", "channel"))
    start = Random(levels=(0.35,), seed=3).trajectory(model, smap, losses, BATCHES).at(0.35)
    rule = method().plan()[0]
    rule = rule.base if method is WandaSP else rule  # the shares it hands on count what has left already
    small, left = start.sliced(model, smap), smap.cut(start.kept)
    found = rule.scores(model, smap, losses, BATCHES, start.kept)
    np.testing.assert_array_equal(found[start.kept], rule.scores(small, left, losses, BATCHES, np.ones(len(left), np.bool_)))
    further = method(levels=(0.6,)).trajectory(model, smap, losses, BATCHES, start=start)
    assert set(further.removed[further.step_of > 0].tolist()) <= set(np.flatnonzero(start.kept).tolist())


class Renewing(GISP):
    """Calibrates every step on the second batch alone, and says so in its FLOPs."""

    def calibration_for(self, batches, progress):
        return [BATCHES[1]]

    def flops(self, smap, examples):
        return 5.0 * self.levels[-1]


def test_uniform_calibrates_as_its_base_does():
    model = built("llama")
    smap = language_structures(model, TOKENS)
    found = Uniform(base=Renewing(steps=2), levels=(0.4,)).trajectory(model, smap, losses, BATCHES)
    assert found == Uniform(base=GISP(steps=2), levels=(0.4,)).trajectory(model, smap, losses, BATCHES[1:])
    assert Uniform(base=Renewing(steps=2), levels=(0.4,)).flops(smap, 9) == 2.0


def test_uniform_refuses_what_it_could_not_keep():
    with pytest.raises(ValueError, match=r"Uniform decides protect for its base, which sets \('model.layers.0',\) against \(\)"):
        Uniform(base=GISP(protect=("model.layers.0",)))
    with pytest.raises(ValueError, match=r"Uniform decides protect_first for its base, which sets 0.125"):
        Uniform(base=LLMPruner())
    assert Uniform(base=LLMPruner(), protect_first=0.125, protect_last=2).plan()[1] == 1
    model = gpt2(layers=6).eval()
    smap = language_structures(model, TOKENS, units=("layer",))
    for pruner in (Uniform(base=ShortGPT(), levels=(0.3,)), WandaSP(levels=(0.3,))):
        with pytest.raises(ValueError, match="every block of this map holds one structure"):
            pruner.trajectory(model, smap, losses, BATCHES)
