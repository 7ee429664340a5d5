"""Structures of language models: mask == surgery, costs == what the real modules hold and compute, nothing guessed."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from fedsim.errors import CapacityError
from fedsim.llm.structures import language_structures
from fedsim.pruning import GISP, PruningTrajectory, Random, StructureMap, Submodel
from tests.fedsim.llm.models import FAMILIES, TOKENS, built, gpt2, llama, tokens

LEVELS = (0.0, 0.15, 0.3, 0.45, 0.6)


def random_order(model: nn.Module, smap: StructureMap, **fields) -> PruningTrajectory:
    return Random(levels=LEVELS, **fields).trajectory(model, smap, None, [(tokens(),)])


def written(model: nn.Module, prompts: Tensor, number: int, **changes):
    """What the model's own ``generate`` writes after ``prompts``, none of whose tokens is padding."""
    settings = {"use_cache": True, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts), **changes}
    return model.generate(prompts, max_new_tokens=number, **settings)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_masking_equals_surgery_at_every_level(name, dtype, tolerance):
    model, inputs = built(name, dtype), tokens()
    smap = language_structures(model, TOKENS)
    for level in LEVELS:
        submodel = random_order(model, smap).at(level)
        with torch.no_grad(), submodel.masked(model, smap):
            masked = model(inputs).logits
        with torch.no_grad():
            sliced = submodel.sliced(model, smap)(inputs).logits
        assert (masked - sliced).abs().max() <= tolerance
        if level == 0:
            assert torch.equal(masked, sliced)
        else:
            assert (masked - model(inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_model_writes_the_same_with_its_cache_as_without(name):
    model = built(name)
    smap = language_structures(model, TOKENS)
    small = random_order(model, smap).at(0.45).sliced(model, smap)
    found = written(small, tokens(2, 6), 8)
    again = tokens(2, 6)
    with torch.no_grad():
        for _ in range(8):
            again = torch.cat([again, small(again).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, again)


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_are_those_of_the_real_module(name):
    model = built(name)
    model.set_attn_implementation("eager")
    smap = language_structures(model, TOKENS)
    for level in LEVELS:
        submodel = random_order(model, smap).at(level)
        small = submodel.sliced(model, smap)
        assert submodel.parameters(smap) == sum(p.numel() for p in small.parameters())
        assert submodel.bytes(smap) == sum(p.numel() * p.element_size() for p in small.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            small(tokens(1))
        assert submodel.flops(smap) == counter.get_total_flops()
        cache = written(small, tokens(1, TOKENS), 1, return_dict_in_generate=True).cache
        held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert submodel.cost("kv_bytes", smap) * TOKENS == 4 * held


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_of_what_is_left_is_the_map_of_the_smaller_model(name):
    model = built(name)
    smap = language_structures(model, TOKENS)
    submodel = random_order(model, smap, min_keep=0).at(0.45)
    left, fresh = smap.cut(submodel.kept), language_structures(submodel.sliced(model, smap), TOKENS)
    assert left.fingerprint == fresh.fingerprint
    assert [b.name for b in left.blocks] == [b.name for b in fresh.blocks]
    none = np.zeros(len(left.blocks), np.int64)
    for cost in ("parameters", "flops", "bytes", "kv_bytes"):
        assert left.cost(cost, none) == fresh.cost(cost, none) == submodel.cost(cost, smap)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_and_mlps_without_any_structure_leave_only_their_bias(name):
    model, inputs = built(name), tokens()
    smap = language_structures(model, TOKENS)
    kept = np.ones(len(smap), np.bool_)
    kept[smap.starts[0] : smap.starts[1]] = False  # the first layer's attention: the cache must still know how long it is
    kept[smap.starts[3] : smap.starts[4]] = False  # the second layer's MLP
    submodel = Submodel(kept, smap.fingerprint)
    small = submodel.sliced(model, smap)
    with torch.no_grad(), submodel.masked(model, smap):
        masked = model(inputs).logits
        expected = written(model, inputs, 6, use_cache=False)
    with torch.no_grad():
        assert (masked - small(inputs).logits).abs().max() < 1e-5
    assert torch.equal(written(small, inputs, 6), expected)
    assert submodel.parameters(smap) == sum(p.numel() for p in small.parameters())


def test_a_layer_is_one_structure_and_leaves_whole():
    model, inputs = built("llama"), tokens()
    smap = language_structures(model, TOKENS, units=("layer",))
    assert [b.name for b in smap.blocks] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    submodel = Submodel(np.array([True, False, True]), smap.fingerprint)
    shallow = built("llama")
    del shallow.model.layers[1]
    shallow.config.num_hidden_layers = 2
    with torch.no_grad():
        assert torch.equal(submodel.sliced(model, smap)(inputs).logits, shallow(inputs).logits)
    assert submodel.sparsity(smap) == pytest.approx(1 / 3)


def test_head_groups_hold_the_rows_the_table_says():
    model = built("llama")  # D 32, 8 heads of 4 features, 4 groups, F 44
    smap = language_structures(model, TOKENS)
    heads, channels = smap.blocks[0], smap.blocks[1]
    assert (heads.kind, len(heads), channels.kind, len(channels)) == ("head_group", 4, "channel", 44)
    assert smap.parameters_of[0] == (2 * 2 + 2) * 4 * 32
    assert smap.parameters_of[4] == 3 * 32
    assert heads.kv_bytes == 2 * 4 * 4
    assert heads.pair_flops == 4 * 2 * 4
    assert {(s.parameter.rpartition("layers.0.")[2], s.indices) for s in smap.slices(1)} == {
        ("self_attn.q_proj.weight", tuple(range(8, 16))),
        ("self_attn.k_proj.weight", tuple(range(4, 8))),
        ("self_attn.v_proj.weight", tuple(range(4, 8))),
        ("self_attn.o_proj.weight", tuple(range(8, 16))),
    }


def test_the_ends_of_a_deep_stack_stay_whole():
    model = llama(num_hidden_layers=20).eval()
    smap = language_structures(model, TOKENS)
    submodel = random_order(model, smap).at(0.6)
    whole = [bool(submodel.kept[smap.starts[i] : smap.starts[i + 1]].all()) for i in range(len(smap.blocks))]
    assert whole == [True] * 4 + [False] * 34 + [True] * 2
    shallow = random_order(model, smap, protect_first=0.0, protect_last=0).at(0.6)
    assert not any(shallow.kept[smap.starts[i] : smap.starts[i + 1]].all() for i in range(len(smap.blocks)))


def test_what_is_not_supported_is_named_with_what_is():
    bert = BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match=r"architecture 'bert' is not supported; supported are .* llama, mistral, qwen2, qwen3, opt, gpt2"):
        language_structures(bert, TOKENS)
    with pytest.raises(ValueError, match="architecture 'Linear' is not supported"):
        language_structures(nn.Linear(2, 2), TOKENS)
    with pytest.raises(ValueError, match="no causal language model of family 'gpt2'"):
        language_structures(gpt2().transformer, TOKENS)
    with pytest.raises(ValueError, match=r"units must be \('layer',\) or some of"):
        language_structures(built("llama"), TOKENS, units=("layer", "channel"))
    shared = built("llama")
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    with pytest.raises(ValueError, match="are one; pruning one use would prune the other"):
        language_structures(shared, TOKENS)
    quantised = built("llama")
    quantised.is_quantized = True
    with pytest.raises(ValueError, match="quantised, and slices of them mean nothing; dequantise it first"):
        language_structures(quantised, TOKENS)


def test_a_level_that_groups_cannot_reach_is_refused_with_what_can():
    model = built("llama, one key-value head")
    with pytest.raises(CapacityError, match=r"level 0.9\d* cannot be reached: at most 0\.\d+ of the prunable parameters"):
        GISP(levels=(0.99,)).trajectory(model, language_structures(model, TOKENS), None, [(tokens(),)])
