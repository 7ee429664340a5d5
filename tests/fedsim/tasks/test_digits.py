"""The digits task: its pictures, domains and split."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedsim.encoding import decode, encode
from fedsim.parameters import Layout
from fedsim.tasks.digits import Digits

DOMAINS = ("upright", "rotated", "inverted", "noisy")
BASE = load_digits().images / 16.0
LABELS = load_digits().target


def test_every_picture_appears_once_in_every_domain_and_in_one_split() -> None:
    train, test = Digits(domains=DOMAINS).data()
    for split in (train, test):
        for domain in range(4):
            np.testing.assert_array_equal(split.keys["picture"][split.keys["domain"] == domain], np.unique(split.keys["picture"]))
    pictures = np.concatenate([np.unique(train.keys["picture"]), np.unique(test.keys["picture"])])
    np.testing.assert_array_equal(np.sort(pictures), np.arange(1797))


def test_domains_are_what_they_say() -> None:
    train = Digits(domains=DOMAINS).data().train
    upright, rotated, inverted, noisy = (train.inputs[train.keys["domain"] == d].reshape(-1, 8, 8) for d in range(4))
    base = BASE[train.keys["picture"][train.keys["domain"] == 0]].astype(np.float32)
    np.testing.assert_array_equal(upright, base)
    np.testing.assert_array_equal(rotated, np.array([np.rot90(p) for p in base]))
    np.testing.assert_allclose(inverted, 1 - base, atol=1e-6)
    inside = (base > 0.3) & (base < 0.7)
    assert (noisy - base)[inside].std() == pytest.approx(0.3, rel=0.15)  # a little less than 0.3, by clipping
    assert noisy.min() == 0
    assert noisy.max() == 1


def test_labels_are_the_pictures_own_and_the_split_is_stratified() -> None:
    train, test = Digits(domains=("inverted", "noisy"), seed=3).data()
    for split in (train, test):
        np.testing.assert_array_equal(split.targets, LABELS[split.keys["picture"]])
        np.testing.assert_array_equal(split.targets, split.keys["label"])
    expected = np.round(0.28 * np.bincount(LABELS))
    np.testing.assert_array_equal(np.bincount(test.targets) / 2, expected)


def test_the_other_domains_and_the_model_do_not_change_a_domain() -> None:
    alone, together = Digits(domains=("noisy",)).data().train, Digits(domains=DOMAINS, model="cnn").data().train
    np.testing.assert_array_equal(alone.inputs, together.inputs[together.keys["domain"] == 3].reshape(-1, 64))


def test_models_fit_the_pictures_in_either_precision() -> None:
    for model, shape in (("mlp", (64,)), ("cnn", (1, 8, 8))):
        for dtype in ("float32", "float64"):
            task = Digits(model=model, dtype=dtype)
            assert task.example.shape == (1, *shape)
            assert Layout.of(task.build(0)).dtype == dtype
            assert task.logits(task.build(0), task.example).shape == (1, 10)
    assert Layout.of(Digits().build(0)).size == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10


def test_equal_tasks_share_their_data_and_other_tasks_do_not() -> None:
    assert Digits(seed=11).data() is Digits(seed=11).data()
    assert Digits(seed=11).data() is not Digits(seed=12).data()
    assert Digits(domains=DOMAINS).domain_names == DOMAINS


def test_a_task_survives_encoding() -> None:
    task = Digits(model="cnn", domains=DOMAINS, hidden=(32,))
    assert decode(*encode(task)) == task


def test_an_mlp_learns_the_domains_within_seconds() -> None:
    task = Digits(domains=("upright", "inverted"), hidden=(64,))
    (train, test), model = task.data(), task.build(0)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    rng = np.random.default_rng(0)
    for _ in range(400):
        optimiser.zero_grad()
        task.losses(model, train.batch(rng.integers(len(train), size=32))).mean().backward()
        optimiser.step()
    assert task.correct(model, test.batch(np.arange(len(test)))).mean() > 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit"}, "model: 'vit' is unknown; choose from mlp, cnn"),
        ({"domains": ("upright", "sideways")}, "'sideways' is unknown; choose from upright, rotated, inverted, noisy"),
        ({"domains": ()}, "at least one domain"),
        ({"domains": ("upright", "upright")}, "none twice"),
        ({"dtype": "float16"}, "dtype"),
        ({"hidden": (64, 0)}, "positive widths"),
        ({"noise": float("nan")}, "noise"),
        ({"test_share": 1.0}, "test_share must lie between 0 and 1"),
    ],
)
def test_bad_fields_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)  # type: ignore[arg-type]
