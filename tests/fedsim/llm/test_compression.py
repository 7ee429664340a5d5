"""Probe Pruning and a bounded cache on one model: what they do together is what they do to the model that was cut."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedsim.llm.eviction import AdaKV, SnapKV, StreamingLLM
from fedsim.llm.obcache import CacheSession, OBCache
from fedsim.llm.probe_pruning import ProbePruning
from fedsim.llm.probing import HistoryOnly
from fedsim.llm.sites import sites_of
from fedsim.llm.structures import language_structures
from fedsim.pruning import Submodel
from tests.fedsim.llm.models import VOCABULARY, built

LONG, BATCH = 24, 4


def texts(seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, LONG), generator=torch.Generator().manual_seed(seed))


def written(model, tokens, number: int = 6) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=number, do_sample=False, use_cache=True, pad_token_id=0
        )


@pytest.mark.parametrize("order", ["probe first", "cache first"])
@pytest.mark.parametrize("name", ["llama, no groups, biases, tied", "opt", "gpt2"])
def test_together_they_are_a_bounded_cache_of_the_cut_model(name, order):
    model, tokens = built(name, torch.float64), texts()
    rule = ProbePruning(sparsity=0.4, multiple=1, fusion=HistoryOnly())
    cache = OBCache(host=SnapKV(window=4, pool=3), budget=12, sink=2)
    history = rule.calibrate(model, [texts(2)])
    first, second = (
        (rule.applied(model, history), cache.applied(model))
        if order == "probe first"
        else (cache.applied(model), rule.applied(model, history))
    )
    with first as one, second as other:
        found = written(model, tokens)
        session, bounded = (one, other) if order == "probe first" else (other, one)
        kept, errors = dict(session.kept), bounded.output_error
    smap = language_structures(model, LONG)
    flags = np.ones(len(smap), np.bool_)
    for number, block in enumerate(smap.blocks):
        for site in sites_of(model):
            if site.name in kept and any(m.weight == f"{site.name}.weight" for m in block.members):
                flags[smap.starts[number] : smap.starts[number + 1]] = False
                flags[smap.starts[number] + kept[site.name].numpy()] = True
    small = Submodel(flags, smap.fingerprint, 0.0).sliced(model, smap)
    with cache.applied(small) as alone:
        assert torch.equal(written(small, tokens), found)
        np.testing.assert_allclose(errors, alone.output_error, rtol=1e-9)


@pytest.mark.parametrize("name", ["llama", "llama, one key-value head", "qwen3, wide heads"])
def test_query_heads_that_run_read_a_bounded_cache_of_their_own_head(name):
    model, tokens = built(name, torch.float64), texts()
    found = []
    for execution in ("slice", "mask"):  # tokens are chosen by age alone, so heads that are zeroed have no say
        rule = ProbePruning(sparsity=0.4, multiple=1, fusion=HistoryOnly(), execution=execution)
        with rule.applied(model, rule.calibrate(model, [texts(2)])), OBCache(host=StreamingLLM(), budget=12).applied(model) as session:
            found.append(written(model, tokens))
            assert all(error > 0 for error in session.output_error)
    assert torch.equal(*found)


def test_a_token_is_worth_what_the_query_heads_that_run_lose_by_it(monkeypatch):
    """Evicted for itself, each token moves the outputs of the heads that read it by what its score says, no other head's counted."""
    model, tokens = built("llama", torch.float64), texts()  # two query heads read each key-value head
    seen = []
    scored = CacheSession._scores
    monkeypatch.setattr(
        CacheSession, "_scores", lambda self, layer, window: seen.append((layer.keys, layer.values, window)) or scored(self, layer, window)
    )
    rule = ProbePruning(sparsity=0.4, multiple=1)
    with rule.applied(model, rule.calibrate(model, [texts(2)])), OBCache(host=SnapKV(window=4), budget=12).applied(model) as cache:
        with torch.no_grad():
            model(tokens, use_cache=True)
        steered = [found for found in seen if found[2].heads is not None]
        assert len(steered) == 2  # the first layer is spared
        keys, values, window = steered[0]
        scores = scored(cache, SimpleNamespace(keys=keys, values=values), window)
    queries, heads = window.queries[:, :, -4:], window.heads.tolist()
    assert len(heads) < 8
    brute = torch.zeros_like(scores)
    for number, head in enumerate(heads):
        logits = window.scale * queries[:, number] @ keys[:, head].mT
        logits = logits.masked_fill(torch.arange(LONG) > torch.arange(LONG - 4, LONG)[:, None], -torch.inf)
        whole = logits.softmax(-1) @ values[:, head]
        for t in range(LONG):
            without = logits.clone()
            without[..., t] = -torch.inf
            brute[:, head, t] += (without.softmax(-1) @ values[:, head] - whole).square().sum((1, 2))
    torch.testing.assert_close(scores, brute, rtol=1e-8, atol=1e-14)
    assert not any(heads.count(g) for g in range(4) if bool((brute[:, g] == 0).all()))


def test_heads_that_share_a_budget_need_whole_groups():
    model = built("llama")
    rule = ProbePruning(sparsity=0.4, multiple=1)
    history = rule.calibrate(model, [texts(2)])
    with (
        rule.applied(model, history),
        OBCache(host=AdaKV(window=4), budget=12).applied(model),
        pytest.raises(ValueError, match="needs every query head"),
    ):
        written(model, texts())
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_without_compression_both_are_the_model_bit_for_bit():
    model, tokens = built("llama"), texts()
    plain = written(model, tokens)
    rule = ProbePruning(sparsity=0.0)
    with rule.applied(model, rule.calibrate(model, [tokens])), OBCache(ratio=1.0).applied(model), torch.no_grad():
        assert torch.equal(model(tokens).logits, built("llama")(tokens).logits)
        assert torch.equal(written(model, tokens), plain)


@pytest.mark.parametrize("name", ["llama", "llama, one key-value head", "qwen2", "opt", "gpt2"])
def test_a_model_pruned_before_is_read_from_its_weights(name):
    model, tokens = built(name, torch.float64), texts()
    smap = language_structures(model, LONG)
    flags = np.random.default_rng(0).random(len(smap)) < 0.6
    flags[smap.starts[0] : smap.starts[1]] = False  # a layer without heads, others with unequally many
    flags[smap.starts[2]], flags[smap.starts[4]] = True, True
    small = Submodel(flags, smap.fingerprint, 0.0).sliced(model, smap)
    found = []
    for execution in ("slice", "mask"):
        rule = ProbePruning(sparsity=0.2, multiple=1, skip=(0,), execution=execution)
        with rule.applied(small, rule.calibrate(small, [texts(2)])) as session:
            with torch.no_grad():
                found.append(small(tokens).logits)
            assert session.probes > 0
    torch.testing.assert_close(*found)
    with OBCache(host=SnapKV(window=4), budget=12).applied(small):
        assert written(small, tokens).shape == (BATCH, LONG + 6)
