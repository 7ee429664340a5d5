"""Importance against identities, brute force and invariances."""

import copy
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from fedsim.errors import FedsimError
from fedsim.pruning import FirstOrder, StructureMap, Submodel, structure_map

AGGREGATES = ("gate", "gate_abs", "sum_abs", "sum_squares", "taylor2")
NORMALISES = ("block_l2", "block_mean", "type_mean", "parameters", "none")


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)


def cnn(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 4))
        ).double()


def batch_for(model: nn.Module, num: int = 20, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (6,) if isinstance(model[0], nn.Linear) else (1, 8, 8)
    dtype = model[0].weight.dtype
    return Batch(torch.randn(num, *shape, generator=generator, dtype=dtype), torch.randint(0, 4, (num,), generator=generator))


def traced(model: nn.Module) -> StructureMap:
    return structure_map(model, batch_for(model).inputs[:1])


def scores(model: nn.Module, batches: list[Batch], kept=None, **fields: str):
    smap = traced(model)
    method = FirstOrder(**{"normalise": "none", "reduce": "mean_then_abs", **fields})
    return method.scores(model.eval(), smap, losses, batches, np.ones(len(smap), np.bool_) if kept is None else kept)


def every_kept(smap: StructureMap):
    return np.ones(len(smap), np.bool_)


@pytest.mark.parametrize("build", [mlp, cnn])
def test_the_gate_gradient_is_the_sum_of_weight_times_gradient_over_the_weights_that_read_it(build) -> None:
    model = build()
    batch, smap = batch_for(model), traced(model)
    kept = np.random.default_rng(0).random(len(smap)) < 0.7
    with Submodel(kept, smap.fingerprint).masked(model, smap):
        weights = dict(model.named_parameters())
        gradient = dict(zip(weights, torch.autograd.grad(losses(model, batch).mean(), list(weights.values())), strict=True))
        expected = np.zeros(len(smap))
        for s in range(len(smap)):
            for piece in smap.slices(s):
                if piece.role == "consumer":
                    product = weights[piece.parameter] * gradient[piece.parameter]
                    expected[s] += product.detach().index_select(piece.dim, torch.tensor(piece.indices)).sum().item()
    assert np.allclose(scores(model, [batch], kept, aggregate="gate")[kept], np.abs(expected)[kept], rtol=0, atol=1e-15)
    assert (expected[kept] != 0).any()


def test_the_gate_gradient_is_the_derivative_of_the_loss_along_the_structures_output() -> None:
    model = mlp()
    batch, smap = batch_for(model), traced(mlp())
    for s, score in enumerate(scores(model, [batch], aggregate="gate")):
        (piece,) = [p for p in smap.slices(s) if p.role == "consumer"]
        values = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            scaled = copy.deepcopy(model)
            scaled.get_parameter(piece.parameter).data[:, piece.indices[0]] *= factor
            values.append(losses(scaled, batch).mean().item())
        assert abs(values[0] - values[1]) / 2e-5 == pytest.approx(score, abs=1e-9)


def reference(model: nn.Module, batch: Batch, aggregate: str, reduce: str):
    """Weight-based scores by their definition, one example and one structure at a time."""
    smap, weights = traced(model), dict(model.named_parameters())
    each = []
    for i in range(len(batch.inputs)):
        loss = losses(model, Batch(batch.inputs[i : i + 1], batch.targets[i : i + 1])).sum()
        each.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    result = []
    for s in range(len(smap)):
        total = 0.0
        for piece in smap.slices(s):
            chosen = [g[piece.parameter].index_select(piece.dim, torch.tensor(piece.indices)) for g in each]
            w, g = weights[piece.parameter].detach().index_select(piece.dim, torch.tensor(piece.indices)), torch.stack(chosen)
            first = (w * g).abs().mean(0) if reduce == "abs_then_mean" else (w * g.mean(0)).abs()
            if aggregate == "taylor2":
                first = (w * g.mean(0) - 0.5 * w**2 * (g**2).mean(0)).abs()
            total += float((first**2 if aggregate == "sum_squares" else first).sum())
        result.append(total)
    return np.asarray(result)


@pytest.mark.parametrize(
    ("aggregate", "reduce"),
    [("sum_abs", "mean_then_abs"), ("sum_abs", "abs_then_mean"), ("sum_squares", "mean_then_abs"), ("taylor2", "mean_then_abs")],
)
@pytest.mark.parametrize("build", [mlp, cnn])
def test_weight_based_scores_are_their_definition(build, aggregate: str, reduce: str) -> None:
    model = build()
    batch = batch_for(model, 7)
    expected = reference(model, batch, aggregate, reduce)
    assert np.allclose(scores(model, [batch], aggregate=aggregate, reduce=reduce), expected, rtol=1e-12)


def test_absolute_values_at_positions_and_over_examples_agree_where_each_unit_has_one_position() -> None:
    model, image = mlp(), cnn()
    by_position = scores(model, [batch_for(model)], aggregate="gate_abs")
    by_example = scores(model, [batch_for(model)], aggregate="gate", reduce="abs_then_mean")
    assert np.allclose(by_position, by_example, rtol=1e-12)
    position, example, mean = (
        scores(image, [batch_for(image)], aggregate="gate_abs"),
        scores(image, [batch_for(image)], aggregate="gate", reduce="abs_then_mean"),
        scores(image, [batch_for(image)], aggregate="gate"),
    )
    assert (position > example).all()
    assert (example > mean).all()


@pytest.mark.parametrize(
    ("aggregate", "reduce"), [*itertools.product(("gate", "sum_abs"), ("mean_then_abs", "abs_then_mean")), ("taylor2", "mean_then_abs")]
)
def test_how_the_calibration_is_cut_into_batches_does_not_matter(aggregate: str, reduce: str) -> None:
    model = mlp(dtype=torch.float32)
    batch = batch_for(model, 24)
    whole = scores(model, [batch], aggregate=aggregate, reduce=reduce)
    parts = [Batch(batch.inputs[a:b], batch.targets[a:b]) for a, b in ((0, 3), (3, 17), (17, 24))]
    assert np.abs(scores(model, parts, aggregate=aggregate, reduce=reduce) - whole).max() < 1e-6 * whole.max()


@pytest.mark.parametrize("normalise", NORMALISES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_permuting_units_permutes_their_scores(aggregate: str, normalise: str) -> None:
    model = mlp()
    order = torch.tensor([4, 2, 8, 0, 1, 7, 3, 6, 5])
    permuted = copy.deepcopy(model)
    permuted[0].weight.data, permuted[0].bias.data = model[0].weight.data[order], model[0].bias.data[order]
    permuted[2].weight.data = model[2].weight.data[:, order]
    kept = np.ones(16, np.bool_)
    kept[[int(order[0]), 12]] = False
    moved = np.concatenate([kept[:9][order], kept[9:]])
    before = scores(model, [batch_for(model)], kept, aggregate=aggregate, normalise=normalise)
    after = scores(permuted, [batch_for(model)], moved, aggregate=aggregate, normalise=normalise)
    assert np.allclose(after[:9], before[:9][order], rtol=1e-10)
    assert np.allclose(after[9:], before[9:], rtol=1e-10)


@pytest.mark.parametrize("aggregate", ["gate", "sum_abs"])
def test_moving_scale_between_a_relu_units_rows_and_columns_changes_no_score(aggregate: str) -> None:
    model = mlp()
    scaled = copy.deepcopy(model)
    scaled[0].weight.data[3] *= 5
    scaled[0].bias.data[3] *= 5
    scaled[2].weight.data[:, 3] /= 5
    batch = batch_for(model)
    assert np.allclose(scores(scaled, [batch], aggregate=aggregate), scores(model, [batch], aggregate=aggregate), rtol=1e-10)


def test_removed_structures_score_as_in_the_sliced_model() -> None:
    model = mlp()
    smap, batch = traced(model), batch_for(model)
    kept = np.random.default_rng(3).random(len(smap)) < 0.6
    small = Submodel(kept, smap.fingerprint).sliced(model, smap)
    for aggregate, normalise in itertools.product(AGGREGATES, ("block_l2", "block_mean", "type_mean", "none")):
        masked = scores(model, [batch], kept, aggregate=aggregate, normalise=normalise)[kept]
        assert np.allclose(masked, scores(small, [batch], aggregate=aggregate, normalise=normalise), rtol=1e-9)


def test_normalisation_divides_by_what_it_says() -> None:
    model = cnn()
    batch, smap = batch_for(model), traced(model)
    raw = scores(model, [batch])
    first, second = raw[:6], raw[6:]
    for normalise, expected in {
        "block_l2": (first / np.linalg.norm(first), second / np.linalg.norm(second)),
        "block_mean": (first / first.mean(), second / second.mean()),
        "type_mean": (first / raw.mean(), second / raw.mean()),
        "parameters": (first / (9 + 1 + 5 * 9), second / (6 * 9 + 1 + 4 * 4)),
    }.items():
        assert np.allclose(scores(model, [batch], normalise=normalise), np.concatenate(expected))
    assert smap.blocks[0].kind == smap.blocks[1].kind == "filters"
    with pytest.raises(ValueError, match=r"no constant for structures of kind 'filters'"):
        scores(model, [batch], normalise="published")
    dense = mlp()
    assert np.allclose(scores(dense, [batch_for(dense)], normalise="published")[:9] * 2 * 9, scores(dense, [batch_for(dense)])[:9])


def test_a_non_finite_loss_or_gradient_names_the_batch() -> None:
    model = mlp()
    batch = batch_for(model)
    bad = Batch(batch.inputs.clone(), batch.targets)
    bad.inputs[4] = float("nan")
    with pytest.raises(FedsimError, match="example 4 of calibration batch 1 is nan"):
        scores(model, [batch, bad])
    smap = traced(model)

    def steep(m: nn.Module, b: Batch) -> Tensor:
        value = losses(m, b)
        return (value - value.detach()).clamp(min=0).sqrt()  # 0, with an infinite slope

    for aggregate in ("gate", "sum_abs"):
        with pytest.raises(FedsimError, match="gradient became non-finite in calibration batch 0"):
            FirstOrder(aggregate=aggregate, reduce="mean_then_abs").scores(model, smap, steep, [batch], every_kept(smap))


def test_an_objective_must_give_one_loss_per_example() -> None:
    model = mlp()
    smap = traced(model)
    with pytest.raises(ValueError, match=r"one loss per example, got shape \(\)"):
        FirstOrder().scores(model, smap, lambda m, b: losses(m, b).mean(), [batch_for(model)], every_kept(smap))


def test_frozen_weights_have_scores_and_stay_frozen() -> None:
    model, frozen = mlp(), mlp()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    smap, batch = traced(frozen), batch_for(model)
    for aggregate in ("gate", "sum_abs"):
        with torch.no_grad():
            value = FirstOrder(aggregate=aggregate, normalise="none", reduce="mean_then_abs").scores(
                frozen, smap, losses, [batch], every_kept(smap)
            )
        assert np.allclose(value, scores(model, [batch], aggregate=aggregate))
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("field", ["aggregate", "normalise", "reduce"])
def test_unknown_choices_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of .*, got 'loudest'"):
        FirstOrder(**{field: "loudest"})


def trained_on_digits(seed: int) -> tuple[nn.Module, Batch]:
    """An MLP 64-24-24-10 and held-out pictures."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    inputs, targets = torch.from_numpy(pictures / 16).float(), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(5):
            for rows in torch.randperm(1300).split(32):
                optimiser.zero_grad()
                F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
                optimiser.step()
    return model, Batch(inputs[1300:], targets[1300:])


def loss_without_each(model: nn.Module, smap: StructureMap, batch: Batch):
    """Mean loss with one structure removed, for every structure (S,)."""
    result = []
    for s in range(len(smap)):
        kept = every_kept(smap)
        kept[s] = False
        with torch.no_grad(), Submodel(kept, smap.fingerprint).masked(model, smap):
            result.append(float(losses(model, batch).mean()))
    return np.asarray(result)


@pytest.mark.parametrize("aggregate", ["gate", "sum_abs"])
def test_scores_rank_units_of_trained_models_as_their_removal_does_and_shuffled_ones_do_not(aggregate: str) -> None:
    correlations, controls = [], []
    for seed in range(3):
        model, batch = trained_on_digits(seed)
        smap = structure_map(model, batch.inputs[:1])
        truth = loss_without_each(model, smap, batch)
        ranked = FirstOrder(aggregate=aggregate, normalise="none").scores(model, smap, losses, [batch], every_kept(smap))
        correlations.append(spearmanr(ranked, truth).statistic)
        shuffles = np.random.default_rng(seed).permuted(np.tile(ranked, (40, 1)), axis=1)
        controls.append(np.mean([spearmanr(s, truth).statistic for s in shuffles]))
    assert np.mean(correlations) > 0.5
    assert np.abs(controls).max() < 0.1


@pytest.mark.parametrize("aggregate", ["gate", "sum_abs", "taylor2"])
def test_plain_tuples_are_batches_too(aggregate: str) -> None:
    model = mlp()
    smap, batch = traced(model), batch_for(model, 6)
    method, every = FirstOrder(aggregate=aggregate), every_kept(smap)

    def of_tuples(live: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return losses(live, Batch(*pair))

    found = method.scores(model, smap, of_tuples, [tuple(batch)], every)
    assert np.array_equal(found, method.scores(model, smap, losses, [batch], every))


class Answers(NamedTuple):
    inputs: Tensor  # (B, A, D)


@pytest.mark.parametrize("aggregate", ["gate", "gate_abs"])
def test_rows_of_one_example_are_added_up_before_its_absolute_value(aggregate: str) -> None:
    model = mlp()
    smap, batch = traced(model), Answers(batch_for(model, 24).inputs.view(8, 3, 6))

    def spread(live: nn.Module, questions: Answers) -> Tensor:
        return live(questions.inputs.flatten(0, 1)).square().sum(1).view(-1, 3).std(1)

    method = FirstOrder(aggregate=aggregate, reduce="abs_then_mean", normalise="none")
    of_one = FirstOrder(aggregate=aggregate, reduce="mean_then_abs", normalise="none")
    single = [of_one.scores(model, smap, spread, [Answers(batch.inputs[i : i + 1])], every_kept(smap)) for i in range(8)]
    assert np.allclose(method.scores(model, smap, spread, [batch], every_kept(smap)), np.mean(single, axis=0), rtol=1e-12)


def test_rows_that_belong_to_no_example_are_refused() -> None:
    model = mlp()

    def shared(live: nn.Module, batch: Batch) -> Tensor:
        return losses(live, batch) + live(batch.inputs[:5]).sum()

    with pytest.raises(ValueError, match=r"2\.weight reads 5 rows for 20 losses"):
        FirstOrder(aggregate="gate").scores(model, traced(model), shared, [batch_for(model)], every_kept(traced(model)))
    mean = FirstOrder(aggregate="gate", reduce="mean_then_abs")
    assert mean.scores(model, traced(model), shared, [batch_for(model)], every_kept(traced(model))).all()


def test_the_defaults_of_a_model_can_be_read() -> None:
    smap = traced(mlp())
    assert FirstOrder().resolved(smap) == FirstOrder(aggregate="gate", reduce="abs_then_mean", compact=False)
    assert FirstOrder(aggregate="taylor2").resolved(smap) == FirstOrder(aggregate="taylor2", reduce="mean_then_abs", compact=False)
    assert FirstOrder(aggregate="sum_abs").resolved(smap) == FirstOrder(aggregate="sum_abs", reduce="abs_then_mean", compact=False)
