"""Scores of cached tokens against what they claim: tokens removed one at a time, limits, and what attention cannot see."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.llm import Attention, AttentionTimesValueNorm, Evict, Joint, Key, RandomScore, Value, eviction_error
from fedsim.llm.token_scores import token_scores

B, H, G, W, T, D = 2, 4, 2, 8, 64, 16
SCALE = D**-0.5
SCORES = [Attention(), AttentionTimesValueNorm(), Value(), Key(), Joint(), Joint(cross=False), Evict(), RandomScore(3)]


def window(seed=0, sharpness=1.0, dtype=torch.float64, queries=W, tokens=T):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, m, D, generator=generator, dtype=torch.float64) for n, m in ((H, queries), (G, tokens), (G, tokens)))
    return (sharpness * q).to(dtype), k.to(dtype), v.to(dtype)


def causal(queries, tokens):
    return torch.arange(tokens) <= torch.arange(tokens - queries, tokens)[:, None]


def outputs(q, k, v, seen=None):
    """(B, G, R, W, D), every head on its own; ``seen`` (W, T) instead of a causal mask."""
    seen = causal(q.shape[2], k.shape[2]) if seen is None else seen
    heads = []
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        z = SCALE * q[:, h] @ k[:, g].mT
        heads.append(torch.softmax(z.masked_fill(~seen, -torch.inf), -1) @ v[:, g])
    return torch.stack(heads, 1).reshape(B, k.shape[1], -1, q.shape[2], D)


def moved(before, after):
    return (after - before).square().sum((2, 3, 4))


def without_each(q, k, v):
    """Squared moves (B, G, T) of the outputs when one token is not there."""
    whole, found = outputs(q, k, v), []
    for t in range(k.shape[2]):
        seen = causal(q.shape[2], k.shape[2])
        seen[:, t] = False
        found.append(moved(whole, outputs(q, k, v, seen)))
    return torch.stack(found, -1)


def scaled(x, t, factor):
    x = x.clone()
    x[:, :, t] *= factor
    return x


@pytest.mark.parametrize("sharpness", [0.5, 1, 4, 20])
@pytest.mark.parametrize("queries", [1, 8])
def test_evict_is_the_move_when_a_token_is_dropped_and_the_softmax_renormalised(sharpness, queries):
    q, k, v = window(1, sharpness, queries=queries)
    np.testing.assert_allclose(token_scores(Evict(), q, k, v, SCALE), without_each(q, k, v), rtol=1e-9, atol=1e-15)


def test_evict_is_exact_where_one_token_takes_all_the_attention():
    q, k, v = window(2)
    q[:, :, :, 0] = 12.0 / SCALE
    k[:, :, 10, 0] = 6.0
    weights = torch.softmax(SCALE * q[:, 0] @ k[:, 0].mT, -1)
    assert weights[..., 10].min() > 1 - 1e-6
    truth = without_each(q, k, v)
    np.testing.assert_allclose(token_scores(Evict(), q, k, v, SCALE), truth, rtol=1e-9, atol=1e-15)
    in_half = token_scores(Evict(), q.float(), k.float(), v.float(), SCALE)
    assert (in_half.argmax(-1) == 10).all()
    np.testing.assert_allclose(in_half[..., 10], truth[..., 10], rtol=1e-3)


def test_value_is_the_move_when_a_value_becomes_zero():
    q, k, v = window(3)
    whole = outputs(q, k, v)
    truth = torch.stack([moved(whole, outputs(q, k, scaled(v, t, 0))) for t in range(T)], -1)
    np.testing.assert_allclose(token_scores(Value(), q, k, v, SCALE), truth, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("score", "shrinks_value"), [(Key(), False), (Joint(), True)])
def test_first_order_scores_are_the_limit_of_small_shrinkage(score, shrinks_value):
    q, k, v = window(4)
    whole, found = outputs(q, k, v), token_scores(score, q, k, v, SCALE)

    def relative_gap(small):
        shrunk = [
            moved(whole, outputs(q, scaled(k, t, 1 - small), scaled(v, t, 1 - small) if shrinks_value else v)) / small**2 for t in range(T)
        ]
        return float(((found - torch.stack(shrunk, -1)).abs() / found.mean()).max())

    assert relative_gap(1e-5) < 1e-3
    assert relative_gap(1e-3) > 10 * relative_gap(1e-5)
    assert relative_gap(1.0) > 0.2, "a first-order score is not the move at full size"


def test_joint_without_its_cross_term_is_the_sum_of_value_and_key():
    args = (*window(5), SCALE)
    np.testing.assert_allclose(
        token_scores(Joint(cross=False), *args), token_scores(Value(), *args) + token_scores(Key(), *args), rtol=1e-12
    )


def test_vatp_is_attention_times_the_norm_of_the_value():
    q, k, v = window(6)
    np.testing.assert_allclose(
        token_scores(AttentionTimesValueNorm(), q, k, v, SCALE), token_scores(Attention(), q, k, v, SCALE) * v.abs().sum(-1), rtol=1e-12
    )


def change(score, old, new):
    before, after = token_scores(score, *old, SCALE), token_scores(score, *new, SCALE)
    return float(((after - before).abs().amax() / before.amax()).item())


def test_only_evict_ignores_both_shifts_that_attention_ignores():
    q, k, v = window(7)
    shift = 2 * torch.randn(D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    keys, values = (q, k + shift, v), (q, k, v + shift)
    assert change(Evict(), (q, k, v), keys) < 1e-9
    assert change(Evict(), (q, k, v), values) < 1e-9
    for score in (Attention(), Value()):
        assert change(score, (q, k, v), keys) < 1e-9
    assert change(Key(), (q, k, v), values) < 1e-9
    for score in (Key(), Joint()):
        assert change(score, (q, k, v), keys) > 0.5
    for score in (Value(), AttentionTimesValueNorm()):
        assert change(score, (q, k, v), values) > 0.5


def test_evict_keeps_its_precision_in_float32_when_values_share_a_large_part():
    q, k, v = window(9)
    truth = token_scores(Evict(), q, k, v, SCALE)
    found = token_scores(Evict(), q.float(), k.float(), v.float() + 100, SCALE)
    np.testing.assert_allclose(found, truth, rtol=2e-2)


@pytest.mark.parametrize("sharpness", [0.5, 1, 2])
def test_output_aware_scores_rank_tokens_closer_to_the_truth_than_attention(sharpness):
    agreement = {score: [] for score in (Attention(), Value(), Joint(), Evict())}
    for seed in range(5):
        q, k, v = window(seed, sharpness)
        truth = without_each(q, k, v)
        for score, found in agreement.items():
            scores = token_scores(score, q, k, v, SCALE)
            found += [spearmanr(scores[b, g], truth[b, g]).statistic for b in range(B) for g in range(G)]
    mean = {score: np.mean(found) for score, found in agreement.items()}
    assert mean[Evict()] > 1 - 1e-12
    assert mean[Value()] > mean[Attention()] + 0.005
    assert mean[Joint()] > mean[Attention()] + 0.005


def test_with_small_weights_and_alike_values_scores_rank_as_attention():
    q, k, _ = window(10, 0.3, queries=1)
    q = q[:, ::2].repeat_interleave(2, 1)
    v = torch.linalg.qr(torch.randn(B, G, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    k = torch.cat([k, torch.zeros(B, G, T, 64 - D, dtype=torch.float64)], -1)
    q = torch.cat([q, torch.zeros(B, H, 1, 64 - D, dtype=torch.float64)], -1)
    by_attention = token_scores(Attention(), q, k, v, SCALE).argsort(-1)
    for score in (Value(), Evict()):
        np.testing.assert_array_equal(token_scores(score, q, k, v, SCALE).argsort(-1), by_attention)


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_every_score_has_the_laws_of_a_score(score):
    q, k, v = window(11)
    found = token_scores(score, q, k, v, SCALE)
    assert found.shape == (B, G, T)
    assert found.dtype == torch.float64
    assert bool((found >= 0).all())
    assert token_scores(score, q.bfloat16(), k.bfloat16(), v.bfloat16(), SCALE).dtype == torch.float32
    assert torch.equal(found, token_scores(score, q, k, v, SCALE))
    if not isinstance(score, RandomScore):
        swapped = token_scores(score, q.flip(1), k.flip(1), v.flip(1), SCALE)
        np.testing.assert_allclose(swapped.flip(1), found, rtol=1e-12)
        parts = sum(token_scores(score, q[:, :, i : i + 1], k, v, SCALE, causal(W, T)[None, None, i : i + 1]) for i in range(W))
        np.testing.assert_allclose(parts, found, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("score", [s for s in SCORES if not isinstance(s, RandomScore)], ids=repr)
def test_many_queries_score_as_their_blocks_do(score):
    q, k, v = window(12, queries=200, tokens=200)
    mask = causal(200, 200)[None, None]
    whole = token_scores(score, q, k, v, SCALE)
    np.testing.assert_allclose(token_scores(score, q, k, v, SCALE, mask.expand(B, H, -1, -1)), whole, rtol=1e-12)
    parts = sum(token_scores(score, q[:, :, i : i + 50], k, v, SCALE, mask[:, :, i : i + 50]) for i in range(0, 200, 50))
    np.testing.assert_allclose(parts, whole, rtol=1e-10)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("score", SCORES, ids=repr)
def test_no_tensor_is_larger_than_the_weights_of_64_queries(score):
    q, k, v = window(queries=640, tokens=640)
    with Largest() as largest:
        token_scores(score, q, k, v, SCALE)
    assert largest.numel <= B * H * 64 * 640


@pytest.mark.parametrize("score", SCORES[:-1], ids=repr)
def test_masked_tokens_and_blind_queries_count_nothing(score):
    q, k, v = window(13)
    mask = causal(W, T).repeat(B, 1, 1, 1)
    mask[0, :, :, :5] = False
    mask[1, :, 2] = False
    found = token_scores(score, q, k, v, SCALE, mask)
    assert bool((found[0, :, :5] == 0).all())
    alone = token_scores(score, q[:1], k[:1, :, 5:], v[:1, :, 5:], SCALE)
    np.testing.assert_allclose(found[:1, :, 5:], alone, rtol=1e-9)
    rest = [i for i in range(W) if i != 2]
    np.testing.assert_allclose(
        found[1:], token_scores(score, q[1:, :, rest], k[1:], v[1:], SCALE, mask[1:, :, rest]), rtol=1e-9, atol=1e-15
    )


def test_a_query_that_sees_one_token_counts_nothing_for_evict():
    q, k, v = window(14, queries=3, tokens=3)
    first = causal(3, 3)[None, None, :1]
    assert bool((token_scores(Evict(), q[:, :, :1], k, v, SCALE, first) == 0).all())
    assert bool(token_scores(Evict(), q, k, v, SCALE).isfinite().all())


def test_a_number_that_is_not_finite_is_not_hidden():
    q, k, v = window(15)
    k[0, 0, 3] = torch.nan
    assert bool(token_scores(Evict(), q, k, v, SCALE)[0, 0].isnan().any())


def test_the_error_of_a_set_is_what_its_removal_does():
    q, k, v = window(16)
    kept = torch.rand(B, G, T, generator=torch.Generator().manual_seed(1)) < 0.5
    kept[:, :, -1] = True
    whole = outputs(q, k, v)
    left = torch.stack([torch.stack([outputs(q, k, v, causal(W, T) & kept[b, g])[b, g] for g in range(G)]) for b in range(B)])
    truth = (left - whole).square().sum().sqrt() / whole.square().sum().sqrt()
    assert float(eviction_error(q, k, v, SCALE, kept)) == pytest.approx(float(truth), rel=1e-10)
    assert float(eviction_error(q, k, v, SCALE, torch.ones_like(kept))) == 0
    one = torch.ones_like(kept)
    one[1, 0, 7] = False
    single = token_scores(Evict(), q, k, v, SCALE)[1, 0, 7]
    assert float(eviction_error(q, k, v, SCALE, one)) == pytest.approx(float((single / whole.square().sum()).sqrt()), rel=1e-9)


def test_random_scores_follow_their_seed():
    args = (*window(17), SCALE)
    assert torch.equal(token_scores(RandomScore(1), *args), token_scores(RandomScore(1), *args))
    assert not torch.equal(token_scores(RandomScore(1), *args), token_scores(RandomScore(2), *args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :3], k, v), "every key-value head must serve equally many query heads"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), r"keys and values \(B, G, T, D\)"),
        (lambda q, k, v: (q, k[:, :, :4], v[:, :, :4]), "there are 8 queries and 4 tokens"),
        (lambda q, k, v: (q, k, v, SCALE, torch.ones(B, 1, W, 3, dtype=torch.bool)), r"mask must be \(B, 1 or H, 8, 64\)"),
        (lambda q, k, v: (q, k, v, SCALE, torch.ones(B, 1, W, T)), "boolean"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    args = change(*window())
    with pytest.raises(ValueError, match=message):
        token_scores(Evict(), *(args if len(args) > 3 else (*args, SCALE)))
