"""What models write: token for token as transformers' own generate, by the law they state, whatever shares a batch."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fedsim.llm.generation import generate
from fedsim.llm.structures import language_structures
from fedsim.pruning import Random, Submodel
from tests.fedsim.llm.models import FAMILIES, TOKENS, VOCABULARY, built, tokens

END = 7


def prompts(lengths=(5, 2, 9, 5, 1), seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(8, VOCABULARY, n) for n in lengths]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("level", [0.0, 0.45])
def test_greedy_traces_are_those_of_transformers(name, level):
    model = built(name)
    smap = language_structures(model, TOKENS)
    model = Random(levels=(0.45,)).trajectory(model, smap, None, [(tokens(),)]).at(level).sliced(model, smap)
    found = generate(model, prompts(), end=END, max_new_tokens=10, temperature=0)
    for prompt, trace in zip(prompts(), found, strict=True):
        inputs = torch.from_numpy(prompt)[None]
        alone = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
            use_cache=True,
        )
        np.testing.assert_array_equal(trace.tokens, alone[0, len(prompt) :].numpy())
        assert trace.finished == (trace.tokens[-1] == END)
    assert model.config.use_cache is False


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_tokens_follow_the_tempered_law_within_the_nucleus(temperature, top_p):
    model, prompt = built("llama"), prompts()[0]
    traces = generate(model, [prompt] * 4000, end=END, max_new_tokens=1, temperature=temperature, top_p=top_p, batch=500)
    counts = np.bincount([t.tokens[0] for t in traces], minlength=VOCABULARY)
    with torch.no_grad():
        law = torch.softmax(model(torch.from_numpy(prompt)[None]).logits[0, -1].double() / temperature, -1).numpy()
    order = np.argsort(-law)
    size = int(np.searchsorted(np.cumsum(law[order]), top_p)) + 1
    law[order[size:]] = 0
    law /= law.sum()
    assert not counts[law == 0].any()
    large = law * 4000 >= 5
    observed, expected = counts[large], law[large] * 4000
    rest = 4000 - expected.sum()
    if rest > 1:
        observed, expected = np.append(observed, 4000 - observed.sum()), np.append(expected, rest)
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_a_trace_does_not_depend_on_what_shares_its_batch():
    model = built("qwen3, wide heads", torch.float64)
    texts = prompts((5, 2, 9, 5, 1, 8, 3))
    whole = generate(model, texts, end=END, max_new_tokens=12, seed=5)
    for batch in (1, 3):
        for one, other in zip(whole, generate(model, texts, end=END, max_new_tokens=12, seed=5, batch=batch), strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
    assert any(t.finished for t in whole) or max(len(t.tokens) for t in whole) == 12
    again = generate(model, texts, end=END, max_new_tokens=12, seed=5, index=1)
    assert any(len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any() for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_first_layer_without_heads_knows_how_many_tokens_went_by(name):
    model = built(name, torch.float64)
    smap = language_structures(model, TOKENS)
    kept = np.ones(len(smap), np.bool_)
    kept[smap.starts[0] : smap.starts[1]] = False
    small = Submodel(kept, smap.fingerprint).sliced(model, smap)
    for prompt, trace in zip(prompts(), generate(small, prompts(), end=END, max_new_tokens=6, temperature=0), strict=True):
        text = torch.from_numpy(prompt)[None]
        for token in trace.tokens.tolist():  # without a cache
            assert int(small(text).logits[0, -1].argmax()) == token
            text = torch.cat([text, torch.tensor([[token]])], 1)


def test_a_prompt_keeps_its_coins_among_fewer_prompts_where_it_keeps_its_id():
    model = built("qwen3, wide heads", torch.float64)
    texts = prompts((5, 2, 9, 5, 1, 8, 3))
    whole = generate(model, texts, end=END, max_new_tokens=12, seed=5)
    some = [1, 4, 6]
    again = generate(model, [texts[i] for i in some], end=END, max_new_tokens=12, seed=5, ids=some)
    for i, trace in zip(some, again, strict=True):
        np.testing.assert_array_equal(trace.tokens, whole[i].tokens)
    with pytest.raises(ValueError, match=r"ids must hold one number for each of 7 prompts, got shape \(3,\)"):
        generate(model, texts, end=END, max_new_tokens=12, ids=some)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_texts_may_fill_learned_positions_and_not_outgrow_them(name):
    model = built(name)
    model.lm_head.weight.data[END] = 0
    longest = generate(model, prompts((5, 2)), end=END, max_new_tokens=60, temperature=0)
    assert [len(t.tokens) for t in longest] == [60, 60]
    with pytest.raises(ValueError, match=rf"a prompt of 5 tokens and max_new_tokens=61 need 65 positions, and this {name} has 64"):
        generate(model, prompts((5, 2)), end=END, max_new_tokens=61, temperature=0)


def test_a_trace_ends_with_its_end_or_is_unfinished():
    model = built("llama")
    model.lm_head.weight.data[END] = 0
    greedy = generate(model, prompts(), end=END, max_new_tokens=4, temperature=0)
    assert all(len(t.tokens) == 4 and not t.finished for t in greedy)
    sampled = generate(model, prompts((3,) * 50), end=END, max_new_tokens=40, temperature=5.0)
    assert any(t.finished for t in sampled)
    assert all((t.tokens[:-1] != END).all() for t in sampled)
    assert generate(model, [], end=END, max_new_tokens=4) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"prompts": [[1], []]}, "prompt 1 must hold at least one token"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    settings = {"prompts": [[1]], "end": END, "max_new_tokens": 2, **fields}
    with pytest.raises(ValueError, match=message):
        generate(built("llama"), **settings)
