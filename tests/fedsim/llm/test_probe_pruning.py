"""Probe Pruning: its choices against what a dense run shows, its runs against masks, its FLOPs against a counter, and what it leaves behind."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim.errors import FedsimError
from fedsim.llm.generation import generate
from fedsim.llm.history import History
from fedsim.llm.probe_pruning import ProbePruning
from fedsim.llm.probing import (
    FixedRatio,
    FLAPImportance,
    FullBatch,
    HistoryOnly,
    ImportanceScaled,
    PPImportance,
    ProbeOnly,
    RandomProbe,
    ResidualImportance,
    WandaImportance,
    mean_squares,
    probe_size,
)
from fedsim.llm.sites import MLPSite, sites_of
from tests.fedsim.llm.models import FAMILIES, TOKENS, VOCABULARY, built, llama

BATCH = 6


def texts(number: int = 3, seed: int = 1, length: int = TOKENS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (BATCH, length), generator=generator) for _ in range(number)]


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def states_of(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every output projection reads."""
    found = {}
    hooks = [
        site.output.register_forward_pre_hook(lambda m, args, name=site.name: found.update({name: args[0].view(*tokens.shape, -1)}))
        for site in sites_of(model)
    ]
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return found


def untouched(model: nn.Module, attention: str) -> bool:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    own = [name for m in model.modules() for name in m.__dict__ if name == "forward"]
    return not hooks and not own and model.config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gathered_weights_do_what_masks_do(name, attention):
    model = built(name)
    model.config._attn_implementation = attention
    found = {}
    for execution in ("slice", "mask"):
        rule = ProbePruning(sparsity=0.4, multiple=1, skip=(0,), execution=execution)
        with rule.applied(model, rule.calibrate(model, texts())) as session:
            found[execution] = [logits(model, tokens) for tokens in texts(seed=2)]
            assert {len(kept) for kept in session.kept.values()} < set(range(1, 100))
    for sliced, masked in zip(found["slice"], found["mask"], strict=True):
        torch.testing.assert_close(sliced, masked, atol=1e-5, rtol=1e-5)
    assert (found["slice"][0] - logits(model, texts(seed=2)[0])).abs().max() > 0.01
    assert untouched(model, attention)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_sparsity_is_the_model_bit_for_bit(name):
    model, tokens = built(name), texts()[0]
    rule = ProbePruning(sparsity=0.0)
    with rule.applied(model, rule.calibrate(model, texts())):
        assert torch.equal(logits(model, tokens), logits(built(name), tokens))
        assert [t.tokens.tolist() for t in generate(model, tokens.numpy(), end=0, max_new_tokens=8, temperature=0)] == [
            t.tokens.tolist() for t in generate(built(name), tokens.numpy(), end=0, max_new_tokens=8, temperature=0)
        ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_survives_an_exception(error):
    model = built("llama")
    before, rule = logits(model, texts()[0]), ProbePruning(sparsity=0.5, multiple=1)
    history = rule.calibrate(model, texts())

    def fail(*args):
        raise error

    def served():
        with rule.applied(model, history):
            logits(model, texts()[0])
            model.model.layers[-1].mlp.act_fn.register_forward_hook(fail)
            logits(model, texts()[0])

    with pytest.raises(error):
        served()
    model.model.layers[-1].mlp.act_fn._forward_hooks.clear()
    assert untouched(model, "sdpa")
    assert torch.equal(logits(model, texts()[0]), before)
    with (
        rule.applied(model, history),
        pytest.raises(RuntimeError, match="in a session of Probe Pruning already"),
        rule.applied(model, history),
    ):
        pass
    with rule.applied(model, history):
        pass


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_full_probe_ranks_by_what_the_dense_run_shows(name):
    model, tokens = built(name), texts(seed=3)[0]
    rule = ProbePruning(
        sparsity=0.1, multiple=1, skip=(0, 1), probe=FullBatch(), fusion=ProbeOnly()
    )  # one layer is pruned: nothing before it moves
    seen = states_of(model, tokens)
    with rule.applied(model, rule.calibrate(model, texts())) as session:
        logits(model, tokens)
    last = [site for site in sites_of(model) if site.layer == 2]
    attention = last[0]
    energy = (seen[attention.name].double() ** 2).mean(0).sum(0)
    weights = attention.columns.double()
    scores = [
        math.sqrt(sum(float((energy[c] ** 2) * (weights[c] ** 4).sum()) for c in range(u * attention.width, (u + 1) * attention.width)))
        for u in range(attention.units)
    ]
    expected = sorted(np.argsort(scores)[::-1][: len(session.kept[attention.name])].tolist())
    assert session.kept[attention.name].tolist() == expected
    assert len(expected) == attention.units - int(0.3 * attention.units)


def test_a_history_alone_is_a_mask_that_never_changes():
    model = built("qwen2")
    rule = ProbePruning(sparsity=0.4, multiple=1, fusion=HistoryOnly())
    kept = []
    with rule.applied(model, rule.calibrate(model, texts())) as session:
        for tokens in texts(4, seed=5):
            logits(model, tokens)
            kept.append({name: units.tolist() for name, units in session.kept.items()})
        assert session.stability == 1.0
        assert session.probes == session.flops.probe == 0
    assert kept[0] == kept[1] == kept[2] == kept[3]
    moving = ProbePruning(sparsity=0.4, multiple=1, fusion=ProbeOnly())
    with moving.applied(model, moving.calibrate(model, texts())) as session:
        for tokens in texts(4, seed=5):
            logits(model, tokens)
        assert 0 < session.stability < 1


@pytest.mark.parametrize("name", ["llama", "llama, no groups, biases, tied", "qwen3, wide heads", "opt", "gpt2"])
def test_decoding_keeps_what_the_prefill_chose(name):
    model, tokens = built(name), texts()[0]
    rule = ProbePruning(sparsity=0.4, multiple=1, fusion=HistoryOnly())
    history = rule.calibrate(model, texts(length=30))
    with rule.applied(model, history):
        written = [trace.tokens for trace in generate(model, tokens.numpy(), end=0, max_new_tokens=8, temperature=0)]
    masked = ProbePruning(sparsity=0.4, multiple=1, fusion=HistoryOnly(), execution="mask")
    with masked.applied(model, history):  # no cache: every token is a prefill, with the same fixed mask
        for row, own in enumerate(written):
            text = tokens[row]
            for token in own:
                assert int(logits(model, text[None])[0, -1].argmax()) == int(token)
                text = torch.cat([text, torch.tensor([int(token)])])


def test_a_cache_filled_outside_is_refused():
    model, tokens = built("llama"), texts()[0]
    rule = ProbePruning(sparsity=0.4, multiple=1)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).cache
        with (
            rule.applied(model, rule.calibrate(model, texts())),
            pytest.raises(ValueError, match="not filled by this session's latest prefill"),
        ):
            model(tokens[:, :1], cache=cache)


@pytest.mark.parametrize("name", ["llama", "llama, no groups, biases, tied"])
def test_a_cache_of_an_earlier_batch_is_not_read_with_the_heads_of_a_later_one(name):
    model, batches = built(name), texts(2)
    rule = ProbePruning(sparsity=0.4, multiple=1)
    with torch.no_grad(), rule.applied(model, rule.calibrate(model, texts())):
        earlier = model(batches[0], use_cache=True).cache
        model(batches[0][:, :1], cache=earlier, use_cache=True)
        later = model(batches[1], use_cache=True).cache
        with pytest.raises(ValueError, match="not filled by this session's latest prefill"):
            model(batches[0][:, :1], cache=earlier, use_cache=True)
        model(batches[1][:, :1], cache=later, use_cache=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_padding_changes_nothing(name):
    model, tokens = built(name), texts()[0]
    padded = torch.cat([tokens, torch.zeros((BATCH, 5), dtype=torch.int64)], 1)
    rule = ProbePruning(sparsity=0.4, multiple=1, pad=0)
    history = rule.calibrate(model, texts(length=20))
    found, kept = [], []
    for batch in (tokens, padded):
        with rule.applied(model, history) as session:
            found.append(logits(model, batch)[:, :TOKENS])
            kept.append({name: units.tolist() for name, units in session.kept.items()})
            after = session.history
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert kept[0] == kept[1]
    assert all(torch.equal(seen.squares[TOKENS:], history.sites[name].squares[TOKENS:]) for name, seen in after.sites.items())


def test_the_history_moves_by_what_ran():
    model, tokens = built("llama"), texts(seed=7)[0]
    rule = ProbePruning(sparsity=0.4, multiple=1, momentum=0.9)
    before = rule.calibrate(model, texts())
    with rule.applied(model, before) as session:
        ran = {}
        for site in sites_of(model):
            site.output.register_forward_pre_hook(lambda m, args, name=site.name: ran.update({name: args[0].clone()}))
        logits(model, tokens)
        for site in sites_of(model):
            site.output._forward_pre_hooks.clear()
        after, sites = session.history, {site.name: site for site in sites_of(model)}
    for name, units in session.kept.items():
        channels = sites[name].channels(units).tolist()
        gone = [c for c in range(len(sites[name].columns)) if c not in channels]
        old, new = before.sites[name].squares, after.sites[name].squares
        torch.testing.assert_close(new[:, channels], 0.9 * old[:, channels] + 0.1 * (ran[name] ** 2).mean(0))
        assert torch.equal(new[:, gone], old[:, gone])
    assert all(torch.equal(after.sites[n].squares, before.sites[n].squares) for n in after.sites if n not in session.kept)


def test_a_history_is_a_value(tmp_path):
    model, batches = built("llama"), [*texts(2), *texts(1, seed=9, length=7)]
    rule = ProbePruning(sparsity=0.4)
    whole = rule.calibrate(model, batches)
    apart = History.merged([rule.calibrate(model, batches[:1]), rule.calibrate(model, batches[1:])])
    name = next(iter(whole.sites))
    states = torch.cat([states_of(model, tokens)[name].flatten(0, 1) for tokens in batches]).double()
    torch.testing.assert_close(whole.sites[name].variance.double(), states.var(0, correction=0), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(whole.sites[name].mean.double(), states.mean(0), rtol=1e-5, atol=1e-7)
    whole.save(tmp_path / "history.npz")
    for other in (apart, History.load(tmp_path / "history.npz")):
        for name, seen in whole.sites.items():
            for field in ("squares", "number", "mean", "variance"):
                torch.testing.assert_close(getattr(other.sites[name], field), getattr(seen, field), rtol=1e-5, atol=1e-7)
    other = llama(4, intermediate_size=40)
    with pytest.raises(ValueError, match=r"down_proj reads 40 channels, the history has 44"), rule.applied(other, whole):
        pass
    with pytest.raises(ValueError, match="calibration needs at least one batch"):
        rule.calibrate(model, [])
    with pytest.raises(ValueError, match="no history to merge"):
        History.merged([])


@pytest.mark.parametrize("name", ["llama", "llama, no groups, biases, tied", "qwen3, wide heads", "opt", "gpt2"])
def test_flops_are_those_that_run(name):
    model, tokens = built(name), texts()[0]
    model.config._attn_implementation = "eager"
    rule = ProbePruning(sparsity=0.4, multiple=1)
    history = rule.calibrate(model, texts())
    with FlopCounterMode(display=False) as dense:
        logits(model, tokens)
    with rule.applied(model, history) as session:
        with FlopCounterMode(display=False) as pruned:
            logits(model, tokens)
        found = session.flops
    assert found.dense == dense.get_total_flops()
    assert found.pruned + found.probe == pruned.get_total_flops()
    assert 0 < found.probe < 0.2 * found.dense
    assert found.pruned < 0.75 * found.dense


def test_the_default_probe_costs_less_than_two_percent():
    model = llama(8, hidden_size=64, intermediate_size=172, num_hidden_layers=4)
    rule = ProbePruning(sparsity=0.4)
    tokens = torch.randint(1, VOCABULARY, (20, 64), generator=torch.Generator().manual_seed(0))
    with rule.applied(model, rule.calibrate(model, [tokens])) as session:
        logits(model, tokens)
    assert 0 < session.flops.probe / session.flops.dense <= 0.02


def test_small_batches_fall_back_to_the_history():
    model = built("llama")
    rule = ProbePruning(sparsity=0.4, multiple=1)
    with rule.applied(model, rule.calibrate(model, texts())) as session:
        logits(model, texts()[0][:3])
        assert session.probes == 0 < session.batches
        logits(model, texts()[0][:4])
        assert session.probes == len(session.kept)


def test_fusion_of_two_numbers():
    probe, history = torch.tensor([3.0, 2.0, 0.0, 5.0]), torch.tensor([1.0, 2.0, 4.0, 0.0])
    torch.testing.assert_close(ImportanceScaled().fuse(probe, history), torch.tensor([2.5, 2.0, 4.0, 5.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(FixedRatio(0.25).fuse(probe, history), torch.tensor([1.5, 2.0, 3.0, 1.25]))
    assert torch.equal(ProbeOnly().fuse(probe, history), probe)
    assert torch.equal(HistoryOnly().fuse(probe, history), history)


def test_importance_of_channels_and_heads():
    rng = np.random.default_rng(0)
    weight, energy, variance = rng.normal(size=(6, 4)), rng.uniform(0.1, 1, 6), rng.uniform(0.1, 1, 6)
    columns, f, v = (torch.tensor(x, dtype=torch.float32) for x in (weight, energy, variance))
    brute = {
        PPImportance(): [
            np.linalg.norm([f_ * w**2 for f_, w in zip(energy[i : i + 2], weight[i : i + 2], strict=True)]) for i in (0, 2, 4)
        ],
        WandaImportance(): [sum(np.sqrt(energy[c]) * abs(weight[c]).sum() for c in (i, i + 1)) for i in (0, 2, 4)],
        FLAPImportance(): [np.mean([variance[c] * (weight[c] ** 2).sum() for c in (i, i + 1)]) for i in (0, 2, 4)],
    }
    for rule, expected in brute.items():
        np.testing.assert_allclose(rule.scores(f, v, rule.constant(columns), 2), expected, rtol=1e-5)
    spread, peaked = torch.tensor([[0.5] * 4, [0.9, 0.0, 0.0, 0.0]])  # many small weights against one large
    both, even = torch.stack([spread, peaked]), torch.ones(2)
    assert PPImportance().scores(even, even, PPImportance().constant(both), 1).argmax() == 1
    assert WandaImportance().scores(even, even, WandaImportance().constant(both), 1).argmax() == 0


def test_the_probe_reads_what_is_large_on_the_residual_stream():
    norms = torch.ones(5, 40)
    norms[3, 7], norms[3, 30], norms[1, 12] = 9.0, 8.0, 7.0
    rows, columns = ResidualImportance().select(norms, 1, 12, 0)
    assert rows.tolist() == [3]
    assert {7, 12, 30} < set(columns.tolist())
    assert columns.tolist() == sorted(columns.tolist())
    assert ResidualImportance().select(norms, 1, 3, 0)[1].tolist() == [0, 12, 30]  # so short a probe reads the first token
    assert probe_size(20, 1024, 0.05, 0.5) == (1, 512)
    assert probe_size(20, 1, 0.05, 0.5) == (1, 1)
    draws = [RandomProbe(0).select(norms, 2, 10, number) for number in (0, 0, 1)]
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][1], draws[2][1])


def test_mean_squares_count_real_tokens_alone():
    states = torch.tensor([[[1.0], [2.0]], [[3.0], [100.0]]])
    found, number = mean_squares(states, torch.tensor([[True, True], [True, False]]))
    assert found.tolist() == [[5.0], [4.0]]
    assert number.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("sparsity", [0.4, 0.6, 0.75])
def test_on_planted_channels_a_probe_beats_a_fixed_mask(sparsity):
    """Each of four domains drives its own quarter of a gated MLP; batches are of one domain, the history is of all."""
    generator = torch.Generator().manual_seed(0)
    hidden, channels, quarter = 32, 64, 16
    up, down = (torch.randn(channels, hidden, generator=generator) / 4 for _ in range(2))

    def states(domain: int) -> torch.Tensor:
        x = torch.randn(20, 30, hidden, generator=generator)
        gate = 0.1 * torch.randn(20, 30, channels, generator=generator)
        gate[..., domain * quarter : (domain + 1) * quarter] += 4
        return torch.nn.functional.silu(gate) * (x @ up.T)

    everywhere = torch.ones(20, 30, dtype=torch.bool)
    history = sum(mean_squares(states(d), everywhere)[0] for d in range(4)) / 4
    importance, constant = PPImportance(), PPImportance().constant(down)
    errors = {"fixed": [], "PP": [], "full": []}
    for domain in range(4):
        z = states(domain)
        rows, columns = torch.arange(1), torch.arange(0, 30, 2)
        probe = mean_squares(z[rows][:, columns], everywhere[rows][:, columns])[0]
        energies = {
            "fixed": history.sum(0),
            "PP": ImportanceScaled().fuse(probe, history[columns]).sum(0),
            "full": mean_squares(z, everywhere)[0].sum(0),
        }
        for name, energy in energies.items():
            kept = importance.scores(energy, energy, constant, 1).topk(round((1 - sparsity) * channels)).indices
            errors[name].append(float((z @ down - z[..., kept] @ down[kept]).norm() / (z @ down).norm()))
    fixed, pp, full = (np.mean(errors[name]) for name in ("fixed", "PP", "full"))
    assert full <= pp < fixed
    assert fixed >= 3 * pp


def test_bad_input():
    for fields, message in (
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1.0"),
        ({"sparsity": 0.4, "samples": 1.5}, r"samples must lie in \(0, 1\]: a probe is a part of the batch, got 1.5"),
        ({"sparsity": 0.4, "tokens": 0.0}, r"tokens must lie in \(0, 1\]"),
        ({"sparsity": 0.4, "momentum": -0.1}, "momentum must lie in"),
        ({"sparsity": 0.4, "multiple": 0}, "multiple must be at least 1"),
        ({"sparsity": 0.4, "execution": "both"}, "execution must be 'slice' or 'mask'"),
        ({"sparsity": 0.4, "importance": FLAPImportance()}, "needs fusion=HistoryOnly"),
    ):
        with pytest.raises(ValueError, match=message):
            ProbePruning(**fields)
    with pytest.raises(ValueError, match="weight must lie in"):
        FixedRatio(2.0)
    model = built("llama")
    history = ProbePruning(sparsity=0.4).calibrate(model, texts())
    lost = ProbePruning(sparsity=0.4, skip=(0, 3))
    with pytest.raises(ValueError, match=r"skip names layers \[3\], the model has 0..2"), lost.applied(model, history):
        pass
    greedy = ProbePruning(sparsity=0.8)
    with pytest.raises(ValueError, match=r"with 1 of 3 layers whole leaves layer 1 -1 of 8 heads"), greedy.applied(model, history):
        pass
    with (
        ProbePruning(sparsity=0.4).applied(model, history),
        pytest.raises(ValueError, match=r"has 13 tokens, the history knows positions up to 12"),
    ):
        logits(model, texts(length=13)[0])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with ProbePruning(sparsity=0.4).applied(model, history), pytest.raises(FedsimError, match=r"states of layer 1 .* are not finite"):
        logits(model, texts()[0])


def test_flap_compensates_for_the_mean_of_what_leaves():
    model, tokens = built("llama, no groups, biases, tied"), texts()[0]
    with torch.no_grad():  # constant channels: their mean is all they are
        mlp = model.model.layers[2].mlp
        mlp.up_proj.weight[:20] = 0
        mlp.gate_proj.weight[:20] = 0
        mlp.up_proj.bias[:20] = 2.0
        mlp.gate_proj.bias[:20] = 1.0
    dense = logits(model, tokens)
    rule = ProbePruning(sparsity=20 / 44 / 3 + 0.001, multiple=1, skip=(0, 1), importance=FLAPImportance(), fusion=HistoryOnly())
    name = next(site.name for site in sites_of(model) if site.layer == 2 and isinstance(site, MLPSite))
    with rule.applied(model, rule.calibrate(model, texts())) as session:
        logits(model, tokens)
        assert session.kept[name].tolist() == list(range(20, 44))
        heads = {n: u for n, u in session.kept.items() if n != name}
    assert len(heads) == 1
    plain = ProbePruning(sparsity=20 / 44 / 3 + 0.001, multiple=1, skip=(0, 1), fusion=HistoryOnly())
    gap = []
    for one in (rule, plain):
        with one.applied(model, one.calibrate(model, texts())):
            gap.append(float((logits(model, tokens) - dense).norm()))
    assert gap[0] < gap[1]
