"""Objectives against their formulas, and checkpointing against the plain backward pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.llm import Arithmetic, Decoder, Reasoning
from fedsim.llm.arithmetic import characters
from fedsim.llm.objectives import Checkpointed, Choices, Margin, answer_losses, chosen_rightly
from fedsim.pruning import GISP, FirstOrder
from fedsim.tasks.base import Batch
from tests.fedsim.llm.models import FAMILIES, built, opt, tokens

TASK = Reasoning(
    problems=Arithmetic(number=40, words=1),
    model=Decoder(layers=2, width=32, heads=4, kv_heads=2, hidden=48),
    tokenizer=characters(),
    length=48,
)


def choices(number: int = 5) -> Choices:
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(number):
        a, b = rng.integers(1, 10, 2)
        batches.append(TASK.batch([f"river {a}+{b}"] * 3, [f"{a}+{b}={c}#{c}" for c in (a + b, a + b + 1, a + b + 3)]))
    return Choices(torch.stack([b.inputs for b in batches]), torch.stack([b.targets for b in batches]))


def test_margins_compare_the_right_answer_with_the_wrong_ones():
    model, batch = TASK.build(0), choices()
    losses = torch.stack([TASK.losses(model, Batch(i, t)) for i, t in zip(batch.inputs, batch.targets, strict=True)])
    mean = losses[:, 0] - (losses[:, 1] + losses[:, 2]) / 2
    best = torch.log1p(torch.exp(losses[:, 0] - torch.minimum(losses[:, 1], losses[:, 2])))
    torch.testing.assert_close(Margin(TASK, "mean_wrong")(model, batch), mean)
    torch.testing.assert_close(Margin(TASK)(model, batch), best)
    assert chosen_rightly(TASK, model, batch).tolist() == [float(row.argmin() == 0) for row in losses]


def without(batch: Choices, question: int, answer: int) -> Choices:
    targets = batch.targets.clone()
    targets[question, answer] = -100
    return Choices(batch.inputs, targets)


@pytest.mark.parametrize("kind", ["mean_wrong", "best_wrong"])
def test_an_absent_answer_counts_for_nothing(kind):
    model, batch = TASK.build(0), choices()
    weight = model.model.layers[0].mlp.down_proj.weight
    two = Choices(*(part[:1, :2] for part in batch))
    fewer = Choices(*(part[:1] for part in without(batch, 0, 2)))
    for part in (fewer, two):
        assert Margin(TASK, kind)(model, part).isfinite().all()
    torch.testing.assert_close(Margin(TASK, kind)(model, fewer), Margin(TASK, kind)(model, two))
    gradients = [torch.autograd.grad(Margin(TASK, kind)(model, part).sum(), weight)[0] for part in (fewer, two)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    mixed = Margin(TASK, kind)(model, without(batch, 0, 2))
    torch.testing.assert_close(mixed[1:], Margin(TASK, kind)(model, batch)[1:])


def test_an_absent_answer_is_never_chosen():
    model, batch = TASK.build(0), choices()
    for absent in (1, 2):
        losses = answer_losses(TASK, model, without(batch, 0, absent))
        assert losses[0, absent] == torch.inf
        assert losses[1:].isfinite().all()
        other = 3 - absent
        assert chosen_rightly(TASK, model, without(batch, 0, absent))[0] == float(losses[0, 0] < losses[0, other])
    for answers in ((0,), (1, 2)):
        alone = batch
        for answer in answers:
            alone = without(alone, 3, answer)
        with pytest.raises(ValueError, match="question 3 has no right answer, or no wrong one"):
            chosen_rightly(TASK, model, alone)


def test_checkpointing_the_user_had_on_stays_on():
    model, batch = built("llama"), Batch(tokens(), tokens().roll(-1, 1))
    model.activation_checkpointing_enable()
    layers = model.model.layers
    before = [(layer.training, layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in layers]
    Checkpointed(TASK.losses)(model, batch)
    assert [(layer.training, layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in layers] == before
    assert all(layer.gradient_checkpointing for layer in layers)


def test_the_gradient_of_the_mean_margin_is_that_of_right_less_that_of_wrong():
    model, batch = TASK.build(0), choices()
    weight = model.model.layers[0].mlp.down_proj.weight

    def gradient(loss):
        return torch.autograd.grad(loss.mean(), weight)[0]

    right, *wrong = (TASK.losses(model, Batch(batch.inputs[:, a], batch.targets[:, a])) for a in range(3))
    expected = gradient(right) - (gradient(wrong[0]) + gradient(wrong[1])) / 2
    torch.testing.assert_close(gradient(Margin(TASK, "mean_wrong")(model, batch)), expected, atol=1e-6, rtol=1e-4)


def test_a_margin_prunes_like_any_objective():
    model = TASK.build(0)
    smap = TASK.structures(model)
    trajectory = GISP(levels=(0.4,), steps=3).trajectory(model, smap, Margin(TASK), [choices(3), choices(4)])
    assert trajectory.at(0.4).sparsity(smap) > 0.35


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("aggregate", ["sum_abs", "gate"])
def test_checkpointing_changes_no_score(name, aggregate):
    model, batch = built(name), Batch(tokens(), tokens().roll(-1, 1))
    if name == "opt":
        model.config.dropout = 0.0
        for layer in model.model.decoder.layers:
            layer.dropout = 0.0
    smap = replace(TASK, length=12).structures(model)
    method, every = FirstOrder(aggregate=aggregate, reduce="mean_then_abs"), np.ones(len(smap), np.bool_)
    plain = method.scores(model, smap, TASK.losses, [batch], every)
    np.testing.assert_allclose(method.scores(model, smap, Checkpointed(TASK.losses), [batch], every), plain, rtol=1e-5)
    assert not any(m.training for m in model.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_checkpointing_computes_layers_again_in_the_backward_pass():
    model, batch = built("llama"), Batch(tokens(), tokens().roll(-1, 1))
    runs: list[int] = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    Checkpointed(TASK.losses)(model, batch).sum().backward()
    assert len(runs) == 2


def test_objectives_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="kind must be 'best_wrong' or 'mean_wrong', got 'worst'"):
        Margin(TASK, "worst")
    model = TASK.build(0)
    with pytest.raises(ValueError, match=r"choices must be \(questions, at least 2 answers, tokens\), got shape \(5, 1, 48\)"):
        Margin(TASK)(model, Choices(*(part[:, :1] for part in choices())))
    with pytest.raises(ValueError, match="Linear has no layers that can be checkpointed"):
        Checkpointed(TASK.losses)(nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match="drop out while training; set its dropout to 0"):
        Checkpointed(TASK.losses)(opt(), Batch(tokens(), tokens()))
