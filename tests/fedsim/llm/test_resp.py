"""RESP: what it calibrates on, when it writes anew, and what it reduces to."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.errors import CollapsedError
from fedsim.llm import RESP, Arithmetic, Decoder, Reasoning, generate
from fedsim.llm.arithmetic import characters
from fedsim.llm.reasoning import hash_answer
from fedsim.llm.resp import _batch
from fedsim.pruning import GISP
from fedsim.tasks.base import Batch

MODEL = Decoder(architecture="qwen3", layers=2, width=32, heads=4, kv_heads=2, hidden=48)
TASK = Reasoning(problems=Arithmetic(number=60, words=1, terms=3), model=MODEL, tokenizer=characters(), length=48)
PLAIN = RESP(
    tokenizer=TASK.tokenizer, levels=(0.5,), steps=5, max_new_tokens=24, on_collapse="keep_old", milestones=(), temperature=1.0, top_p=1.0
)


def trained() -> torch.nn.Module:
    """A model that mostly ends what it writes."""
    model = TASK.build(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    train = TASK.data().train
    for step in range(60):
        optimiser.zero_grad()
        TASK.losses(model, train.batch(np.arange(16) + 16 * (step % 3))).mean().backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return trained()


def batches() -> list[Batch]:
    train = TASK.data().train
    return [train.batch(np.arange(6)), train.batch(np.arange(6, 10))]


def spied(monkeypatch) -> list[dict]:
    calls: list[dict] = []

    def spy(author, prompts, **settings):
        traces = generate(author, prompts, **settings)
        calls.append(
            {"author": author, "prompts": prompts, "traces": traces, "parameters": sum(p.numel() for p in author.parameters()), **settings}
        )
        return traces

    monkeypatch.setattr("fedsim.llm.resp.generate", spy)
    return calls


def test_without_milestones_it_is_gisp_on_traces_of_the_dense_model_bit_for_bit(model):
    smap = TASK.structures(model)
    found = PLAIN.trajectory(model, smap, TASK.losses, batches())
    prompts = [b.inputs[i, : int((b.targets[i] != -100).int().argmax()) + 1].numpy() for b in batches() for i in range(len(b.inputs))]
    traces = generate(model, prompts, end=TASK.tokenizer.end, max_new_tokens=24, temperature=1.0, seed=0, index=1)
    rows = [(p, t.tokens) for p, t in zip(prompts, traces, strict=True)]
    own = [_batch(rows[:6], TASK.tokenizer.pad, torch.device("cpu")), _batch(rows[6:], TASK.tokenizer.pad, torch.device("cpu"))]
    expected = GISP(levels=(0.5,), steps=5).trajectory(model, smap, TASK.losses, own)
    np.testing.assert_array_equal(found.removed, expected.removed)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_batch_of_traces_asks_for_the_traces_alone():
    batch = _batch([(np.array([1, 2, 3]), np.array([4, 5])), (np.array([6]), np.array([7, 8, 9, 9]))], 0, torch.device("cpu"))
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.targets.tolist() == [[-100, -100, 4, 5], [7, 8, 9, 9]]


def test_it_writes_anew_with_the_pruned_model_whenever_a_milestone_is_passed(model, monkeypatch):
    calls = spied(monkeypatch)
    replace(PLAIN, milestones=(0.15, 0.2, 0.35), steps=10).trajectory(model, TASK.structures(model), TASK.losses, batches())
    assert [len(c["prompts"]) for c in calls] == [10, 10, 10, 10]
    assert [c["index"] for c in calls] == [1, 4, 5, 8]  # sparsity has passed a milestone before these steps of 5 % each
    sizes = [c["parameters"] for c in calls]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_the_deployed_model_writes_first_where_there_is_one(model, monkeypatch):
    calls = spied(monkeypatch)
    smap = TASK.structures(model)
    deployed = PLAIN.trajectory(model, smap, TASK.losses, batches()).at(0.3).sliced(model, smap)
    calls.clear()
    PLAIN.trajectory(model, smap, TASK.losses, batches(), deployed=deployed)
    assert [c["author"] for c in calls] == [deployed]


def test_a_share_of_the_questions_is_refreshed_and_none_means_never(model, monkeypatch):
    calls = spied(monkeypatch)
    smap = TASK.structures(model)
    half = replace(PLAIN, milestones=(0.2, 0.4), refresh=0.5).trajectory(model, smap, TASK.losses, batches())
    assert [len(c["prompts"]) for c in calls] == [10, 5, 5]
    assert [list(c["ids"]) == sorted(c["ids"]) != list(range(5)) for c in calls[1:]] == [True, True]
    calls.clear()
    replace(PLAIN, milestones=(0.2,), refresh=0.01).trajectory(model, smap, TASK.losses, batches())
    assert [len(c["prompts"]) for c in calls] == [10, 1]
    never = replace(PLAIN, milestones=(0.2, 0.4), refresh=0.0).trajectory(model, smap, TASK.losses, batches())
    assert never == PLAIN.trajectory(model, smap, TASK.losses, batches())
    assert never != half


def test_traces_that_are_not_wanted_leave_the_older_ones_in_place(model):
    gold = batches()
    sums = replace(PLAIN, keep="correct", answer=hash_answer, temperature=1.0)
    seen: list[Batch] = []

    def watched(live, batch):
        seen.append(batch)
        return TASK.losses(live, batch)

    sums.trajectory(model, TASK.structures(model), watched, gold)
    old = [(i, t) for b in gold for i, t in zip(b.inputs, b.targets, strict=True)]
    new = [(i, t) for b in seen[:2] for i, t in zip(b.inputs, b.targets, strict=True)]
    same = 0
    for (_, before), (_, after) in zip(old, new, strict=True):
        texts = [TASK.tokenizer.decode(t[t != -100]) for t in (before, after)]
        assert hash_answer(texts[0]) == hash_answer(texts[1])
        same += texts[0] == texts[1]
    assert same > 0


def test_a_model_that_never_ends_what_it_writes_is_refused(model):
    fields = {"on_collapse": "raise", "max_new_tokens": 1, "temperature": 0.0}
    with pytest.raises(CollapsedError, match=r"none of 10 traces ended within max_new_tokens=1 at sparsity 0\.000"):
        replace(PLAIN, **fields).trajectory(model, TASK.structures(model), TASK.losses, batches())


def test_after_a_collapse_the_old_traces_stay(model):
    seen: list[Batch] = []

    def watched(live, batch):
        seen.append(batch)
        return TASK.losses(live, batch)

    replace(PLAIN, max_new_tokens=1, temperature=0.0, steps=1).trajectory(model, TASK.structures(model), watched, batches())
    for found, given in zip(seen, batches(), strict=True):
        assert torch.equal(found.inputs, given.inputs)
        assert torch.equal(found.targets, given.targets)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"milestones": (0.3, 0.2)}, r"milestones must be rising sparsities in \(0, 1\)"),
        ({"refresh": 1.5}, r"refresh must be a share in \[0, 1\], got 1.5"),
        ({"keep": "best"}, "keep must be one of"),
        ({"keep": "correct"}, "answer= says when a trace is correct"),
        ({"on_collapse": "ignore"}, "on_collapse must be one of"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"top_p": 2.0}, r"top_p must lie in \(0, 1\], got 2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, got 0"),
        ({"generation_batch": 0}, "generation_batch must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **fields)


def test_an_example_without_a_question_is_named(model):
    batch = batches()[0]
    with pytest.raises(ValueError, match="calibration example 2 asks for no token"):
        PLAIN.trajectory(
            model,
            TASK.structures(model),
            TASK.losses,
            [Batch(batch.inputs, torch.where(torch.arange(6)[:, None] == 2, -100, batch.targets))],
        )
