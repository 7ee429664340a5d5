"""A bounded cache against a slow law without one: what is kept, what is written, what is held, and that nothing is left behind."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache

from fedsim.errors import FedsimError
from fedsim.llm import (
    H2O,
    TOVA,
    AdaKV,
    Attention,
    AttentionTimesValueNorm,
    Evict,
    Joint,
    Key,
    OBCache,
    RandomScore,
    SnapKV,
    StreamingLLM,
    Value,
    budget_for,
    eviction_error,
    generate,
    kv_bytes_per_token,
)
from fedsim.llm.evicted_cache import EvictedLayer, RaggedLayer
from fedsim.llm.structures import language_structures
from fedsim.pruning import Submodel
from tests.fedsim.llm.eviction_reference import Reference
from tests.fedsim.llm.models import FAMILIES, VOCABULARY, built, llama, tokens

LONG = 24
HOSTS = [
    H2O(recent=3),
    H2O(recent=0, window=4),
    TOVA(),
    SnapKV(window=4, pool=3),
    SnapKV(window=4, pool=1),
    AdaKV(window=4, pool=3, floor=0.8),
    AdaKV(window=2, pool=1, floor=0),
    StreamingLLM(),
]


def written(model, prompt, many, **settings):
    """Tokens and logits (B, n, V) of greedy generation."""
    inputs = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": many, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    found = model.generate(prompt, **{**inputs, **settings}, output_logits=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits, 1)


def cut(model, removed):
    """``model`` without the structures whose block and index are in ``removed``."""
    smap = language_structures(model, 12)
    kept = np.array([(s.block, s.index) not in removed for s in smap.structures])
    return Submodel(kept, smap.fingerprint).sliced(model, smap)


def uneven(name="llama"):
    """Layers with 3, 1 and 4 of 4 key-value heads."""
    return cut(built(name, torch.float64), {("model.layers.0.self_attn", 1), *(("model.layers.1.self_attn", i) for i in (0, 2, 3))})


def matches_reference(model, prompt, host, budget, decode, many=4):
    reference = Reference(host, budget, 2, decode)
    sequences, logits = reference.write(model, prompt, many)
    cache = DynamicCache(config=model.config)
    with OBCache(host=host, budget=budget, sink=2, decode=decode).applied(model):
        found, own = written(model, prompt, many, cache=cache)
    eager = model.config._attn_implementation == "eager"  # whose softmax is in float32
    np.testing.assert_allclose(own, logits, atol=1e-5 if eager else 1e-9)
    assert torch.equal(found, sequences)
    return cache


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_written_is_what_attention_without_the_evicted_tokens_writes(name, implementation):
    model = built(name, torch.float64)
    model.set_attn_implementation(implementation)
    for host, decode in ((SnapKV(window=4, pool=3), False), (TOVA(), True), (AdaKV(window=4, pool=3, floor=0.5), False)):
        matches_reference(model, tokens(2, LONG), host, 9, decode)


@pytest.mark.parametrize(("host", "decode"), [(host, decode) for host in HOSTS for decode in {False, host.decodes}])
def test_every_host_keeps_what_its_slow_law_keeps(host, decode):
    model = built("llama", torch.float64)
    for budget in (8, 13):
        matches_reference(model, tokens(2, LONG), host, budget, decode)


@pytest.mark.parametrize("host", [SnapKV(window=4, pool=3), AdaKV(window=4, pool=3), H2O(recent=2)], ids=repr)
def test_pruned_models_of_unequal_layers_are_read_from_their_tensors(host):
    cache = matches_reference(uneven(), tokens(2, LONG), host, 9, False)
    assert [layer.keys.shape[1] for layer in cache.layers] == ([1, 1, 1] if host.floor else [3, 1, 4])


@pytest.mark.parametrize("host", [SnapKV(window=4, pool=3), AdaKV(window=4, pool=3)], ids=repr)
def test_a_layer_without_heads_holds_as_many_tokens_of_no_bytes(host):
    model = cut(built("llama", torch.float64), {("model.layers.1.self_attn", i) for i in range(4)})
    cache = matches_reference(model, tokens(2, LONG), host, 9, False)
    assert cache.layers[1].keys.numel() == 0
    with OBCache(host=host, budget=9).applied(model) as session:
        model(tokens(2, LONG), use_cache=True, cache=(cache := DynamicCache(config=model.config)))
        assert session.tokens_held == (9, 9, 9)
        assert session.bytes_held == 9 * 2 * kv_bytes_per_token(model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_budget_that_is_not_reached_changes_no_bit(name, implementation):
    model = built(name)
    model.set_attn_implementation(implementation)
    prompt = tokens(2, LONG)
    plain_logits = model(prompt).logits
    plain = written(model, prompt, 3)
    for host in (SnapKV(), H2O(), AdaKV()):
        with OBCache(host=host, budget=60).applied(model) as session:
            assert torch.equal(model(prompt).logits, plain_logits)
            assert all(torch.equal(a, b) for a, b in zip(written(model, prompt, 3), plain, strict=True))
        assert session.output_error == (0.0, 0.0, 0.0)
    with OBCache(ratio=1.0).applied(model):
        assert all(torch.equal(a, b) for a, b in zip(written(model, prompt, 3), plain, strict=True))


@pytest.mark.parametrize(("host", "implementation"), [*((host, "sdpa") for host in HOSTS), (TOVA(), "eager"), (AdaKV(window=4), "eager")])
def test_padded_rows_are_as_if_alone(host, implementation):
    model = built("llama", torch.float64 if implementation == "sdpa" else torch.float32)
    model.set_attn_implementation(implementation)
    lengths = (LONG, 11, 17)
    rows = [tokens(1, n, seed=n) for n in lengths]
    batch = torch.cat([torch.cat([torch.zeros(1, LONG - n, dtype=torch.int64), row], 1) for n, row in zip(lengths, rows, strict=True)])
    mask = torch.tensor([[0] * (LONG - n) + [1] * n for n in lengths])
    for budget in (8, 13, 20):
        with OBCache(host=host, budget=budget, sink=2, decode=host.decodes).applied(model):
            _, together = written(model, batch, 4, attention_mask=mask)
            for row, own in zip(rows, together, strict=True):
                np.testing.assert_allclose(own, written(model, row, 4)[1][0], atol=1e-9 if implementation == "sdpa" else 1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_sampling_many_prompts_under_a_budget_writes_what_each_prompt_would_alone(name):
    model, rng = built(name, torch.float64), np.random.default_rng(0)
    prompts = [rng.integers(8, VOCABULARY, n) for n in (20, 9, 14, 5)]
    for host in (SnapKV(window=3, pool=3), AdaKV(window=3, pool=3), H2O(recent=2)):
        with OBCache(host=host, budget=8, sink=2).applied(model):
            end = int(generate(model, prompts[:1], end=0, max_new_tokens=3)[0].tokens[-1])
            whole = generate(model, prompts, end=end, max_new_tokens=6)
            alone = generate(model, prompts, end=end, max_new_tokens=6, batch=1)
        assert [t.tokens.tolist() for t in whole] == [t.tokens.tolist() for t in alone]
        assert len({len(t.tokens) for t in whole}) > 1, "rows must leave the batch"


def filled(model, prompt, method, cache=None, **settings):
    """The cache after a pass under ``method``."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad(), method.applied(model):
        model(prompt, cache=cache, use_cache=True, **settings)
    return cache


def test_positions_go_on_where_the_text_does():
    model, prompt, chunk = built("llama", torch.float64), tokens(2, LONG), tokens(2, 3, seed=5)
    cache = filled(model, prompt, OBCache(budget=9, host=SnapKV(window=4)))
    held = DynamicCache()
    for number, layer in enumerate(cache.layers):
        held.update(layer.keys, layer.values, number)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        default = model(chunk, cache=cache, use_cache=True).logits
        stated = model(chunk, cache=other, use_cache=True, position_ids=torch.arange(LONG, LONG + 3)[None]).logits
        wrong = model(chunk, cache=held, use_cache=True).logits
    assert torch.equal(default, stated)
    assert (default - wrong).abs().max() > 1e-3
    assert cache.get_seq_length() == LONG + 3


@pytest.mark.parametrize("host", [SnapKV(window=4, pool=3), AdaKV(window=4, pool=3, floor=0.3), H2O(recent=2)], ids=repr)
def test_a_second_pass_of_several_tokens_is_held_to_the_budget_too(host):
    model, prompt, chunk = built("llama", torch.float64), tokens(2, LONG), tokens(2, 6, seed=5)
    method = OBCache(host=host, budget=9, sink=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), method.applied(model) as session:
        for part in (prompt, chunk, chunk):
            model(part, cache=cache, use_cache=True)
            assert session.tokens_held == (9, 9, 9)
            assert all(error > 0 for error in session.output_error)
    for layer in cache.layers:
        assert layer.seen == LONG + 12
        assert bool((layer.positions.amax(-1) == LONG + 11).all())


def test_decoding_can_be_held_to_the_budget():
    model, prompt = built("qwen3, wide heads"), tokens(3, LONG)
    for host in (H2O(recent=4), TOVA(), StreamingLLM()):
        cache = DynamicCache(config=model.config)
        with OBCache(host=host, budget=16, decode=True).applied(model) as session:
            written(model, prompt, 12, cache=cache)
            assert session.tokens_held == (16, 16, 16)
        assert cache.get_seq_length() == LONG + 11


def test_strides_evict_less_often_and_hold_less_than_a_stride_more():
    model, cache, held = built("llama"), DynamicCache(), []
    with OBCache(host=TOVA(), budget=10, decode=True, stride=4).applied(model) as session, torch.no_grad():
        for part in (tokens(1, LONG), *tokens(9, 1)):
            model(part.reshape(1, -1), cache=cache, use_cache=True)
            held += [set(session.tokens_held)]
    assert held == [{n} for n in (10, 11, 12, 13, 10, 11, 12, 13, 10, 11)]


def test_streaming_keeps_the_sink_and_the_newest():
    cache = filled(built("llama"), tokens(1, LONG), OBCache(host=StreamingLLM(), budget=10, sink=3))
    expected = torch.tensor([0, 1, 2, *range(LONG - 7, LONG)])
    assert all(bool((layer.positions == expected).all()) for layer in cache.layers)


def test_ratio_counts_the_tokens_seen():
    model = built("llama")
    for ratio, length, held in ((0.5, 24, 12), (0.4, 23, 10), (0.01, 24, 7)):
        cache = filled(model, tokens(1, length), OBCache(host=SnapKV(window=4), ratio=ratio, sink=2))
        assert [layer.held for layer in cache.layers] == [held] * 3


@pytest.mark.parametrize("score", [Attention(), Value(), RandomScore(1), Evict()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_keys_and_values_are_the_originals_bit_for_bit(score, dtype):
    model, prompt = built("qwen2", dtype), tokens(2, LONG)
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, cache=plain, use_cache=True)
    for host in (SnapKV(window=4), H2O(recent=2), AdaKV(window=4)):
        first = filled(model, prompt, OBCache(host=host, score=score, budget=9)).layers[0]
        where = first.positions.long()
        heads = first.heads.long() if isinstance(first, RaggedLayer) else torch.arange(2)[:, None]
        for b in range(2):
            row = (heads[b], where[b]) if isinstance(first, RaggedLayer) else (heads, where[b])
            assert torch.equal(first.keys[b], plain.layers[0].keys[b][row])
            assert torch.equal(first.values[b], plain.layers[0].values[b][row])


@pytest.mark.parametrize("host", [SnapKV(window=16), AdaKV(window=16), H2O(recent=16)], ids=repr)
def test_bytes_are_those_of_the_tensors_and_of_the_formula(host):
    torch.manual_seed(0)
    model = llama(2, heads=4, max_position_embeddings=512).eval()
    each, batch, layers = kv_bytes_per_token(model), 2, 3
    assert each == layers * 2 * 2 * 8 * 4
    cache = DynamicCache(config=model.config)
    prompt = tokens(batch, 300)
    with OBCache(host=host, budget=64).applied(model) as session:
        with torch.no_grad():
            model(prompt, cache=cache, use_cache=True)
        assert session.bytes_held == 64 * each * batch
        assert session.peak_bytes == (300 + 2 * 64) * each // layers * batch, "a layer is cut down before the next is filled"
        written(model, torch.cat([prompt, prompt[:, :1]], 1), 20, cache=cache)
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert session.bytes_held == held == (64 + 20) * each * batch
        del cache
        assert session.bytes_held == 0
    assert session.tokens_held == ()


@pytest.mark.parametrize(
    ("fields", "published"),
    [
        ({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096}, 524_288),
        ({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}, 131_072),
        ({"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}, 57_344),
    ],
)
def test_bytes_of_a_token_are_those_of_published_models(fields, published):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields, vocab_size=8, intermediate_size=8, dtype="bfloat16")).to(torch.bfloat16)
    assert kv_bytes_per_token(model) == published
    assert budget_for(8 * 2**30, model, batch=4) == 2 * 2**30 // published


def test_a_budget_in_bytes_is_kept_and_one_token_more_would_break_it():
    model, batch, limit = uneven(), 2, 20_000
    assert kv_bytes_per_token(model) == 2 * (3 + 1 + 4) * 4 * 8
    budget = budget_for(limit, model, batch)
    with OBCache(host=SnapKV(window=4), budget=budget).applied(model) as session, torch.no_grad():
        cache = model(tokens(batch, 30), use_cache=True).cache
        assert session.bytes_held <= limit < session.bytes_held * (budget + 1) / budget
        assert cache.get_seq_length() == 30


OPERATIONS = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), lambda x: x[[2, 0, 0]]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda x: x[[1]]),
}


@pytest.mark.parametrize("host", [H2O(recent=2), SnapKV(window=4), AdaKV(window=4)], ids=repr)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_can_be_moved_as_if_they_had_always_been_there(host, operation):
    apply, rows = OPERATIONS[operation]
    model, prompt, chunk = uneven(), tokens(3, LONG), tokens(3, 4, seed=9)
    method = OBCache(host=host, budget=9)
    moved, direct = filled(model, prompt, method), filled(model, rows(prompt), method)
    apply(moved)
    for _ in range(2):
        with torch.no_grad(), method.applied(model):
            found = model(rows(chunk), cache=moved, use_cache=True).logits
            expected = model(rows(chunk), cache=direct, use_cache=True).logits
        np.testing.assert_allclose(found, expected, atol=1e-10)
        for one, other in zip(moved.layers, direct.layers, strict=True):
            assert torch.equal(one.positions, other.positions)


@pytest.mark.parametrize("host", [H2O(recent=2), SnapKV(window=4), AdaKV(window=4)], ids=repr)
def test_newer_tokens_can_be_taken_back_and_older_ones_not(host):
    model, prompt = built("llama", torch.float64), tokens(2, LONG)
    method = OBCache(host=host, budget=9)
    cache = filled(model, prompt, method)
    plain = copy.deepcopy(cache)
    for token in tokens(3, 2, seed=3):
        filled(model, token[:, None], method, cache)
    cache.crop(-3)
    after = tokens(2, 1, seed=4)
    with torch.no_grad(), method.applied(model):
        assert torch.equal(model(after, cache=cache, use_cache=True).logits, model(after, cache=plain, use_cache=True).logits)
    with pytest.raises(RuntimeError, match="only the 1 tokens since the last eviction can be cropped, not 2"):
        cache.crop(-2)


def test_beam_search_is_bounded_and_unchanged_where_the_budget_is_not_reached():
    model, prompt = built("llama"), tokens(2, LONG)
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(prompt)
    plain = model.generate(prompt, **settings)
    with OBCache(budget=60).applied(model):
        assert torch.equal(model.generate(prompt, **settings), plain)
    for host in (TOVA(), H2O(recent=3)):
        with OBCache(host=host, budget=9, decode=True).applied(model) as session:
            cache = DynamicCache(config=model.config)
            model.generate(prompt, **settings, cache=cache)
            assert session.tokens_held == (9, 9, 9)


def test_the_error_reported_is_that_of_the_window():
    model, prompt = built("llama", torch.float64), tokens(2, LONG)
    seen = {}

    def note(module, args, kwargs, output):
        seen["hidden"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_hook(note, with_kwargs=True)
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, cache=plain, use_cache=True)
        queries = attention.q_proj(seen["hidden"]).view(2, LONG, 8, 4).transpose(1, 2)
        cos, sin = model.model.rotary_emb(queries, torch.arange(LONG)[None])
        turned = torch.cat([-queries[..., 2:], queries[..., :2]], -1)
        queries = queries * cos[:, None] + turned * sin[:, None]
    handle.remove()
    for host, width in ((SnapKV(window=4), 4), (TOVA(), 1), (StreamingLLM(), LONG)):
        cache = DynamicCache(config=model.config)
        with OBCache(host=host, budget=9).applied(model) as session, torch.no_grad():
            model(prompt, cache=cache, use_cache=True)
        kept = torch.zeros(2, 4, LONG, dtype=torch.bool).scatter(-1, cache.layers[0].positions.long(), True)
        truth = eviction_error(queries[:, :, -width:], plain.layers[0].keys, plain.layers[0].values, 0.5, kept)
        assert session.output_error[0] == pytest.approx(float(truth), rel=1e-9)
        assert session.output_error[0] > 0.01


def test_no_score_loses_less_than_evict_when_one_token_leaves():
    model, prompt = built("llama", torch.float64), tokens(2, LONG)
    errors = {}
    for score in (Evict(), Attention(), AttentionTimesValueNorm(), Value(), Key(), Joint(), RandomScore()):
        with OBCache(score=score, host=TOVA(), budget=LONG - 1, sink=0).applied(model) as session, torch.no_grad():
            model(prompt, use_cache=True)
        errors[score] = session.output_error[0]
    best = errors.pop(Evict())
    assert all(best < error for error in errors.values())


def traces_of_a_session(model):
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    own = [m for m in model.modules() if "forward" in vars(m)]
    return hooks, own, model.config._attn_implementation


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("within", ["pass", "block"])
def test_nothing_is_left_after_an_exception(error, within):
    model, prompt = built("llama"), tokens(2, LONG)
    plain = model(prompt).logits
    cache = DynamicCache(config=model.config)

    def fails(*args):
        raise error

    def runs():
        with OBCache(budget=40).applied(model), torch.no_grad():
            model(prompt, cache=cache, use_cache=True)
            if within == "pass":
                handle = model.model.layers[1].mlp.register_forward_hook(fails)
                try:
                    model(prompt, use_cache=True)
                finally:
                    handle.remove()
            fails()

    with pytest.raises(error):
        runs()
    assert traces_of_a_session(model) == ([], [], "sdpa")
    assert torch.equal(model(prompt).logits, plain)
    with torch.no_grad():
        model(prompt[:, :3], cache=cache, use_cache=True)
    with OBCache(budget=40).applied(model):
        assert torch.equal(model(prompt).logits, plain)


def test_a_model_has_one_session_and_models_their_own():
    one, other, prompt = built("llama"), built("gpt2"), tokens(2, LONG)
    method = OBCache(host=TOVA(), budget=9)
    with method.applied(one) as first, method.applied(other) as second, torch.no_grad():
        with pytest.raises(RuntimeError, match="one session per model"), method.applied(one):
            pass
        found = one(prompt, use_cache=True).cache
        assert first.tokens_held == (9, 9, 9)
        assert second.tokens_held == ()
        kept = other(prompt, use_cache=True).cache
        assert second.tokens_held == (9, 9, 9)
    assert traces_of_a_session(one) == traces_of_a_session(other) == ([], [], "sdpa")
    assert found.get_seq_length() == kept.get_seq_length() == LONG
    with method.applied(one) as again:
        assert again.tokens_held == ()


def test_training_passes_without_a_cache_are_left_alone():
    model, prompt = built("llama"), tokens(2, LONG)
    with OBCache(host=TOVA(), budget=9).applied(model) as session:
        loss = model(prompt, labels=prompt, use_cache=False).loss
        loss.backward()
    assert session.bytes_held == session.peak_bytes == 0
    assert all(p.grad is not None for p in model.parameters())


def test_layers_with_a_sliding_window_are_left_alone():
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**fields, num_key_value_heads=2, sliding_window=8)).eval()
    plain = written(model, tokens(2, LONG), 6)
    with OBCache(host=TOVA(), budget=5, sink=1).applied(model):
        assert all(torch.equal(a, b) for a, b in zip(written(model, tokens(2, LONG), 6), plain, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of budget and ratio must be given, got budget=None and ratio=None"),
        ({"budget": 50, "ratio": 0.5}, "exactly one of budget and ratio"),
        ({"budget": 36}, "budget must be at least 37, got 36: 4 of the sink, 32 recent ones and one more"),
        ({"budget": 50.0}, "budget must be a whole number of tokens, got 50.0"),
        ({"budget": 50, "sink": -1}, "sink must be a whole number of tokens, got -1"),
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"ratio must lie in \(0, 1\], got 1.5"),
        ({"budget": 50, "stride": 0}, "stride must be a whole number of tokens, at least 1, got 0"),
        ({"budget": 50, "decode": True}, r"SnapKV\(window=32, pool=7\) evicts after prompts alone; with decode=True take H2O"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        OBCache(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(window=0), "window must be a whole number, at least 1, got 0"),
        (lambda: SnapKV(pool=4), "pool must be odd, so that it has a middle, got 4"),
        (lambda: AdaKV(floor=1.5), r"floor must lie in \[0, 1\], got 1.5"),
        (lambda: H2O(recent=-1), "recent must be a whole number, at least 0, got -1"),
        (lambda: H2O(window=0), "window must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_hosts_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_served_is_refused_by_name():
    model, prompt = built("llama"), tokens(2, LONG)
    method = OBCache(host=TOVA(), budget=9)
    with method.applied(model), torch.no_grad():
        with pytest.raises(ValueError, match="not from a layer of kind StaticLayer"):
            model(prompt, cache=StaticCache(config=model.config, max_cache_len=64), use_cache=True)
        with pytest.raises(ValueError, match="padded at the left"):
            model(prompt, attention_mask=torch.tensor([[1] * LONG, [1] * (LONG - 2) + [0] * 2]), use_cache=True)
        broken = copy.deepcopy(model.lm_head.weight.data)
        model.model.layers[1].self_attn.k_proj.weight.data[0] = torch.nan
        with pytest.raises(FedsimError, match="keys or values of layer 1 are not finite"):
            model(prompt, use_cache=True)
        assert torch.equal(broken, model.lm_head.weight)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention must be 'sdpa' or 'eager', got \\['flex_attention'\\]"), method.applied(model):
        pass
    with pytest.raises(ValueError, match="not supported"), method.applied(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="num_bytes must be at least"):
        budget_for(10, model)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        budget_for(10**6, model, batch=0)


def test_a_cache_of_unequal_heads_needs_a_session_of_its_host():
    model, prompt = built("llama"), tokens(2, LONG)
    cache = filled(model, prompt, OBCache(host=AdaKV(window=4), budget=9))
    with pytest.raises(RuntimeError, match=r"go on with it inside OBCache\(...\).applied\(model\)"):
        model(prompt[:, :1], cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="cut down by a host"):
        filled(model, prompt[:, :1], OBCache(host=TOVA(), budget=9), cache)
    dense = filled(model, prompt, OBCache(host=TOVA(), budget=9))
    with pytest.raises(ValueError, match="cut down by a host"):
        filled(model, prompt, OBCache(host=AdaKV(window=4), budget=9), dense)
    with pytest.raises(RuntimeError, match="make a new cache"):
        cache.reset()


def test_a_cache_can_be_emptied_and_filled_again():
    model, prompt = built("llama"), tokens(2, LONG)
    cache = filled(model, prompt, OBCache(host=TOVA(), budget=9))
    cache.reset()
    assert cache.get_seq_length() == 0
    again = filled(model, prompt, OBCache(host=TOVA(), budget=9), cache)
    fresh = filled(model, prompt, OBCache(host=TOVA(), budget=9))
    for one, other in zip(again.layers, fresh.layers, strict=True):
        assert isinstance(one, EvictedLayer)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.positions, other.positions)
