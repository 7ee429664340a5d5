"""Problems, their answers, and the task whose loss counts solutions alone."""

import json
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.llm import GSM8K, Arithmetic, Bytes, Decoder, MathQA, Problems, Reasoning, exact_match
from fedsim.llm.arithmetic import characters, solution
from fedsim.llm.generation import Trace
from fedsim.llm.reasoning import choice, gsm8k_answer, hash_answer, last_number, lenient_choice, mathqa_options
from fedsim.tasks.base import Batch

SMALL = Decoder(architecture="qwen3", layers=2, width=32, heads=4, kv_heads=2, hidden=48)


def task(**changes) -> Reasoning:
    fields = {"problems": Arithmetic(number=60, terse=0.3), "model": SMALL, "tokenizer": characters(), "length": 72}
    return Reasoning(**{**fields, **changes})


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("so 18\n#### 18", 18, 18),
        ("#### 18.0", 18, 18),
        ("#### 1,000", 1000, 1000),
        ("#### $5.", 5, 5),
        ("It is $5.", None, 5),
        ("#### 3\nno, #### 4", 4, 4),
        ("#### -7", -7, -7),
        ("#### $1,234.50 dollars", Decimal("1234.5"), Decimal("1234.5")),
        ("eighteen", None, None),
        ("#### many", None, None),
        ("<think> 9 or 10 </think> 12", None, 12),
        ("<think> 12 </think> none", None, None),
        ("", None, None),
        ("costs 3,000,000", None, 3000000),
        ("#### 12abc", 12, 12),
        ("#### .5", Decimal("0.5"), Decimal("0.5")),
        ("ages 5-6", None, 6),
        ("5 or -6", None, -6),
        ("either 1,2,3", None, 3),
        ("no.5", None, 5),
    ],
)
def test_answers_of_gsm8k(text, strict, lenient):
    assert gsm8k_answer(text) == strict
    assert last_number(text) == lenient


@given(st.integers(-(10**9), 10**9), st.sampled_from(["", "$"]), st.sampled_from(["", ".", ".0", " eggs"]))
def test_a_number_reads_the_same_however_it_is_written(number, sign, after):
    text = f"work 3\n#### {'-' if number < 0 else ''}{sign}{abs(number):,}{after}"
    assert gsm8k_answer(text) == last_number(text) == number


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("the answer is (c)", "c", "c"),
        ("The Answer is: B.", "b", "b"),
        ("answer is (a), no: answer is (d)", "d", "d"),
        ("I choose b", None, "b"),
        ("so it is 27.675", None, "b"),
        ("38 then", None, None),  # two options are 38
        ("a) and then E", None, "e"),
        ("nothing", None, None),
        ("The answer is a bit hard to see, but it must be (c).", None, "c"),
        ("the answer is (c). Checking: the answer is a whole number", "c", "c"),
        ("It takes a day to earn 27.675", None, "b"),
        ("A day, so a.", None, "a"),
        ("the answer is a", "a", "a"),
        ("the answer is d because", None, "d"),
        ("<think>answer is (a)</think> answer is (e)", "e", "e"),
    ],
)
def test_answers_of_mathqa(text, strict, lenient):
    options = mathqa_options("a ) 38 , b ) 27.675 , c ) 38.0 , d ) none of these , e ) $ 1,000")
    assert options == {"a": "38", "b": "27.675", "c": "38.0", "d": "none of these", "e": "$ 1,000"}
    assert choice(text) == strict
    assert lenient_choice(text, options) == lenient


def test_shares_add_up():
    tokenizer = characters()
    texts = ["7+5=12#12", "#13", "12", "7+5", "#12"]
    traces = [Trace(np.append(tokenizer.encode(t), tokenizer.end), True) for t in texts]
    traces[4] = Trace(tokenizer.encode("#12"), False)
    score = exact_match(traces, ["7+5=12#12"] * 5, tokenizer, strict=hash_answer)
    assert (score.strict, score.lenient, score.unparsed, score.unfinished, score.number) == (0.2, 0.4, 0.0, 0.2, 5)
    assert score.length == pytest.approx(np.mean([10, 4, 3, 4, 3]))
    with pytest.raises(ValueError, match="there must be a solution for each trace, and one at least, got 0 and 0"):
        exact_match([], [], tokenizer)
    with pytest.raises(ValueError, match="solution 0 has no answer: 'x'"):
        exact_match(traces[:1], ["x"], tokenizer)


def test_options_reach_the_lenient_parser():
    tokenizer = Bytes()
    traces = [Trace(np.append(tokenizer.encode(t), tokenizer.end), True) for t in ("the answer is (b)", "it is 38", "it is 38")]
    options = [{"a": "38", "b": "12"}, {"a": "38", "b": "12"}, {"a": "12", "b": "38"}]
    solved = {"strict": choice, "lenient": lenient_choice}
    score = exact_match(traces, ["answer is (b)", "answer is (a)", "answer is (a)"], tokenizer, options=options, **solved)
    assert (score.strict, score.lenient, score.unparsed) == (1 / 3, 2 / 3, 0.0)
    with pytest.raises(ValueError, match="there must be options for each trace, got 1 for 3"):
        exact_match(traces, ["answer is (b)"] * 3, tokenizer, options=options[:1], **solved)


def test_problems_of_lists_are_a_value():
    assert Problems(["a", "b"], ["1", "2"], [0, 1], ["x", "y"]) == Problems(("a", "b"), ("1", "2"), (0, 1), ("x", "y"))
    assert len({Problems(["a"], ["1"]), Problems(("a",), ("1",))}) == 1
    assert len(task(problems=Problems(["1+1", "1+2", "1+3"], ["2", "3", "4"]), test_share=0.4).data().test) == 1


def test_every_sum_is_right_in_both_styles():
    problems = Arithmetic(number=200, terms=5, terse=0.5, seed=3).read()
    assert (
        problems == Arithmetic(number=200, terms=5, terse=0.5, seed=3).read() != Arithmetic(number=200, terms=5, terse=0.5, seed=4).read()
    )
    assert 0.3 < np.mean(problems.style) < 0.7
    for question, solved, style in zip(problems.questions, problems.solutions, problems.style, strict=True):
        *words, terms = question.split(" ")
        digits = [int(d) for d in terms.split("+")]
        sums = np.cumsum(digits).tolist()
        expected = (
            ";".join(f"{a}+{d}={b}" for a, d, b in zip(sums[:-1], digits[1:], sums[1:], strict=True))
            if style == 0
            else ",".join(map(str, sums[1:]))
        )
        assert solved == solution(digits, ("long", "terse")[style]) == f"{expected}#{sums[-1]}"
        assert len(words) == 5
        assert len(digits) == 5
    assert characters().decode(characters().encode(problems.questions[0])) == problems.questions[0]


def test_readers_of_published_problems(tmp_path):
    (tmp_path / "gsm.jsonl").write_text(json.dumps({"question": "How many?", "answer": "3 + 4 = 7\n#### 7"}) + "\n")
    assert GSM8K(tmp_path / "gsm.jsonl").read() == Problems(("How many?",), ("3 + 4 = 7\n#### 7",))
    (tmp_path / "gsm.jsonl").write_text(json.dumps({"question": "one\u2028line", "answer": "#### 7"}, ensure_ascii=False), encoding="utf-8")
    assert GSM8K(tmp_path / "gsm.jsonl").read().questions == ("one\u2028line",)
    for reader, found, what in (
        (GSM8K, b"{", "line 1 of .*x.json is no JSON"),
        (MathQA, b"{", "x.json is no JSON"),
        (MathQA, b"\xff", "no text in UTF-8"),
    ):
        (tmp_path / "x.json").write_bytes(found)
        with pytest.raises(ValueError, match=what):
            reader(tmp_path / "x.json").read()
    row = {"Problem": "How far?", "options": "a ) 1 , b ) 2", "Rationale": "one and one", "correct": "b"}
    (tmp_path / "math.json").write_text(json.dumps([row]))
    assert MathQA(tmp_path / "math.json").read() == Problems(("How far?\na ) 1 , b ) 2",), ("one and one\nThe answer is (b).",))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": "How many?", "answer": "seven"}))
    with pytest.raises(ValueError, match=r"the answer of problem 0 of .* does not end in '#### number'"):
        GSM8K(tmp_path / "bad.jsonl").read()
    (tmp_path / "bad.json").write_text(json.dumps([{**row, "correct": "c"}]))
    with pytest.raises(ValueError, match=r"problem 0 of .* offers no option 'c'"):
        MathQA(tmp_path / "bad.json").read()


def test_only_solutions_are_asked_for():
    reasoning = task()
    train, _ = reasoning.data()
    problems = reasoning.problems.read()
    texts = {q + "?" + s: style for q, s, style in zip(problems.questions, problems.solutions, problems.style, strict=True)}
    tokenizer = reasoning.tokenizer
    for inputs, targets, style in zip(train.inputs, train.targets, train.keys["domain"], strict=True):
        asked = targets != -100
        begins = int(np.argmax(asked))
        question, answer = tokenizer.decode(inputs[: begins + 1]), tokenizer.decode(targets[asked])
        assert question.endswith("?")
        assert texts[question + answer] == style
        assert targets[asked][-1] == tokenizer.end
    model = reasoning.build(0)
    own = reasoning.self_targets(model, torch.from_numpy(train.inputs))
    assert torch.equal(own != -100, torch.from_numpy(train.targets) != -100)
    with pytest.raises(ValueError, match=r"row 0 of the inputs holds no separator '\?'"):
        reasoning.self_targets(model, torch.zeros(1, 5, dtype=torch.int64))


def gradient(reasoning: Reasoning, model, batch: Batch) -> torch.Tensor:
    losses = reasoning.losses(model, batch)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(losses.mean(), list(model.parameters()))])


def test_questions_matter_as_inputs_and_not_as_targets():
    reasoning = task()
    model, batch = reasoning.build(0), reasoning.data().train.batch(np.arange(6))
    shuffled = batch.inputs.clone()
    shuffled[:, :8] = shuffled[:, :8].flip(1)
    assert not torch.allclose(gradient(reasoning, model, Batch(shuffled, batch.targets)), gradient(reasoning, model, batch), atol=1e-6)
    prompts_asked = torch.where(batch.targets == -100, batch.inputs.roll(-1, 1), batch.targets)
    assert not torch.allclose(gradient(reasoning, model, Batch(batch.inputs, prompts_asked)), gradient(reasoning, model, batch), atol=1e-6)


def test_long_and_short_solutions_count_alike():
    reasoning = task()
    model = reasoning.build(0)
    both = reasoning.batch(["river 1+2", "stone 1+2"], ["1+2=3#3", "3#3"])
    alone = [Batch(both.inputs[i : i + 1], both.targets[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(
        gradient(reasoning, model, both), sum(gradient(reasoning, model, b) for b in alone) / 2, atol=1e-6, rtol=1e-4
    )
    wide = Batch(
        torch.nn.functional.pad(both.inputs, (0, 30), value=reasoning.tokenizer.pad),
        torch.nn.functional.pad(both.targets, (0, 30), value=-100),
    )
    torch.testing.assert_close(gradient(reasoning, model, wide), gradient(reasoning, model, both), atol=1e-6, rtol=1e-4)


def test_problems_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"problem \d+ has \d+ tokens, length=20 takes 21; raise length"):
        task(length=20).data()
    sums = Problems(("1+1? or not", "1+2", "1+3"), ("1", "2", "3"))
    with pytest.raises(
        ValueError, match=r"question of problem 0 holds the separator '\?', .*; give separator= a text that no question holds"
    ):
        task(problems=sums, test_share=0.4).data()
    own = task(problems=sums, separator="=#")
    batch = own.batch(sums.questions, sums.solutions)
    assert torch.equal(own.self_targets(own.build(0), batch.inputs) != -100, batch.targets != -100)
    with pytest.raises(ValueError, match="question of problem 0 holds the separator"):  # "##" begins before its place
        task(separator="##").batch(["1+1#"], ["2"])
    with pytest.raises(ValueError, match="length=20 is over the positions=19 of this gpt2"):
        task(length=20, model=Decoder(architecture="gpt2", positions=19))
    with pytest.raises(ValueError, match="separator must be text"):
        task(separator="")
    with pytest.raises(ValueError, match="problems must be a source"):
        task(problems=["1+1"])
    with pytest.raises(ValueError, match="there must be a solution for each question, got 1 and 0"):
        Problems(("a",), ())
