"""Laws of every task: losses of single examples, models that depend on the seed alone, data that do not change."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.llm import Arithmetic, CausalLM, Characters, Decoder, Documents, Reasoning
from fedsim.parameters import Layout
from fedsim.tasks.base import Dataset, Splits, Task
from fedsim.tasks.digits import Digits
from fedsim.tasks.images import Images
from fedsim.tasks.models import mlp

PICTURES = np.random.default_rng(1).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Blobs(Task):
    """A user's own task: Gaussian clouds, one a class."""

    num_classes: int = 3
    spread: float = 0.5

    def load(self) -> Splits:
        rng = np.random.default_rng(0)
        targets = np.arange(600) % self.num_classes
        centres = 3 * rng.standard_normal((self.num_classes, 2))
        inputs = (centres[targets] + self.spread * rng.standard_normal((600, 2))).astype(np.float32)
        return Splits(Dataset(inputs[:400], targets[:400]), Dataset(inputs[400:], targets[400:]))

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return mlp((2, 16, self.num_classes))


DECODER = Decoder(layers=2, width=16, heads=2, kv_heads=1, hidden=24)
WORDS = Documents(tuple("ab" * i + "ba" for i in range(3, 80)))

TASKS = [
    pytest.param(Digits(), id="digits, mlp"),
    pytest.param(
        Digits(model="cnn", domains=("noisy", "rotated", "inverted", "upright"), dtype="float64"), id="digits, cnn, float64, domains"
    ),
    pytest.param(Images(train=(PICTURES, np.arange(60) % 7), width=4), id="images, cnn"),
    pytest.param(Images(train=(PICTURES[..., 0], np.arange(60) % 3), model="resnet9", width=8), id="images, resnet9, grey"),
    pytest.param(Blobs(), id="a user's own"),
    pytest.param(CausalLM(texts=WORDS, model=DECODER, tokenizer=Characters("ab"), length=20), id="text, packed"),
    pytest.param(
        CausalLM(
            texts={"one": WORDS, "other": WORDS},
            model=Decoder(architecture="gpt2", layers=1, width=16, heads=2, hidden=24, dtype="float64", attention="eager"),
            tokenizer=Characters("ab"),
            length=50,
            pack=False,
            test_share=0.4,
        ),
        id="text, padded, float64, domains",
    ),
    pytest.param(Reasoning(problems=Arithmetic(number=60), model=DECODER, length=128, test_share=0.3), id="problems"),
]


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_finite_nats_one_for_each_example(task: Task) -> None:
    batch, model = task.data().test.batch(np.arange(12)), task.build(0)
    losses, correct = task.losses(model, batch), task.correct(model, batch)
    probabilities = torch.softmax(task.logits(model, batch.inputs), -1)
    assert losses.shape == correct.shape == (12,)
    assert torch.isfinite(losses).all()
    assert probabilities.shape == (*batch.targets.shape, task.num_classes)
    for i in range(12):  # of a text, the mean over its tokens that are asked for
        asked = batch.targets[i] >= 0
        own, targets = probabilities[i][asked].reshape(-1, task.num_classes), batch.targets[i][asked].reshape(-1)
        expected = -torch.log(own[torch.arange(len(targets)), targets]).mean()
        torch.testing.assert_close(losses[i], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(correct[i], (own.argmax(-1) == targets).float().mean())


@pytest.mark.parametrize("task", TASKS)
def test_splitting_a_batch_changes_nothing(task: Task) -> None:
    test, model = task.data().test, task.build(0)
    whole = test.batch(np.arange(12))
    for measure in (task.losses, task.correct):
        parts = torch.cat([measure(model, test.batch(rows)) for rows in (np.arange(1), np.arange(1, 5), np.arange(5, 12))])
        torch.testing.assert_close(parts, measure(model, whole), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_is_a_function_of_the_seed_alone(task: Task) -> None:
    layout = Layout.of(task.build(0))
    first = layout.flatten(task.build(5))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    np.testing.assert_array_equal(layout.flatten(task.build(5)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not np.array_equal(layout.flatten(task.build(6)), first)


@pytest.mark.parametrize("task", TASKS)
def test_loading_twice_gives_the_same_examples_with_valid_labels_and_keys(task: Task) -> None:
    for first, again in zip(task.load(), task.load(), strict=True):
        np.testing.assert_array_equal(first.inputs, again.inputs)
        np.testing.assert_array_equal(first.targets, again.targets)
        assert first.targets.ndim > 1 or np.array_equal(first.keys["label"], first.targets)
        assert task.skew_key in first.keys
        asked = first.targets[first.targets != -100]
        assert 0 <= asked.min() <= asked.max() < task.num_classes
        assert all(len(values) == len(first) for values in first.keys.values())


@pytest.mark.parametrize("task", TASKS)
def test_the_example_is_one_input_of_the_model(task: Task) -> None:
    assert task.example.shape == (1, *task.data().train.inputs.shape[1:])
    assert task.logits(task.build(0), task.example).shape == (1, *task.data().train.targets.shape[1:], task.num_classes)
    assert task.self_targets(task.build(0), task.data().train.batch([0]).inputs).shape == (1, *task.data().train.targets.shape[1:])
    assert len(task.domain_names) >= 1


def test_data_are_loaded_once_for_equal_tasks_and_forgotten_in_the_end() -> None:
    assert Blobs(spread=0.1).data() is Blobs(spread=0.1).data()
    kept = Blobs(spread=0.1).data()
    for spread in range(1, 6):
        Blobs(spread=float(spread)).data()
    assert Blobs(spread=0.1).data() is not kept


def test_an_unhashable_task_keeps_its_own_data() -> None:
    @dataclass(frozen=True)
    class Listed(Blobs):
        values: list[int] = None  # type: ignore[assignment]

    one, other = Listed(values=[1]), Listed(values=[1])
    assert one.data() is one.data()
    assert one.data() is not other.data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.array([[1.0], [np.nan], [np.inf]]), np.arange(3)), r"inputs\[1\] is not finite \(2 of 3"),
        ((np.zeros((3, 1)), np.arange(2)), "targets has 2 entries for 3 inputs"),
        ((np.zeros((3, 1)), np.arange(3), {"domain": np.arange(4)}), "domain has 4 entries"),
        ((np.zeros((3, 1)), np.arange(3), {"domain": np.zeros(3)}), "key 'domain' must hold one integer"),
    ],
)
def test_bad_data_sets_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset(*arguments)  # type: ignore[arg-type]
