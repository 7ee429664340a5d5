"""GISP and its baselines: order, schedule, special cases and refusals."""

import itertools
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import CapacityError, FedsimError
from fedsim.pruning import GISP, FirstOrder, Magnitude, OneShot, Random, Submodel, structure_map
from fedsim.pruning.schedule import _number_to_goal

GATE = FirstOrder(aggregate="gate", normalise="none", reduce="mean_then_abs")


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")


def setting(hidden: tuple[int, int] = (10, 8)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, hidden[0]), nn.ReLU(), nn.Linear(hidden[0], hidden[1]), nn.ReLU(), nn.Linear(hidden[1], 4)
        ).double()
        batch = Batch(torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 4, (30,)))
    return model, structure_map(model, batch.inputs[:1]), batch


def test_without_interactions_the_order_is_exact_and_every_prefix_optimal() -> None:
    # logits are not squashed: the loss is a sum of one positive term per unit, so removing a set costs the sum of its terms
    weights = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.2, 0.7], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    model[0].weight.data[:], model[0].bias.data[:] = 1, 0
    model[2].weight.data[0], model[2].bias.data[:] = -weights, 0
    batch = (torch.tensor([[1.0], [3.0]], dtype=torch.float64),)
    smap = structure_map(model, batch[0][:1])
    trajectory = GISP(levels=(0.8,), steps=5, importance=GATE).trajectory(model, smap, lambda m, b: m(b[0])[:, 0], [batch])
    assert trajectory.removed.tolist() == np.argsort(weights.numpy()).tolist()[: len(trajectory.removed)]
    for size in range(1, 5):
        cheapest = min(itertools.combinations(range(6), size), key=lambda chosen: float(weights[list(chosen)].sum()))
        assert set(trajectory.removed[:size].tolist()) == set(cheapest)


def test_with_a_step_per_structure_it_is_the_greedy_search() -> None:
    model, smap, batch = setting((7, 5))
    trajectory = GISP(levels=(0.7,), steps=200, importance=GATE).trajectory(model, smap, losses, [batch])
    kept, greedy = np.ones(len(smap), np.bool_), []
    for _ in trajectory.removed:
        with Submodel(kept, smap.fingerprint).masked(model, smap):
            weights = [model[2].weight, model[4].weight]
            gradients = torch.autograd.grad(losses(model, batch).mean(), weights)
            gate = torch.cat([(w * g).sum(0) for w, g in zip(weights, gradients, strict=True)]).abs().detach().numpy()
        gate[~kept] = np.inf
        for block in (slice(0, 7), slice(7, 12)):
            if kept[block].sum() == 1:
                gate[block] = np.inf
        greedy.append(int(np.argmin(gate)))
        kept[greedy[-1]] = False
    assert trajectory.removed.tolist() == greedy
    assert len(set(trajectory.step_of.tolist())) == len(greedy)


def test_one_step_is_the_one_shot_baseline() -> None:
    model, smap, batch = setting((40, 40))
    assert GISP(levels=(0.6,), steps=1).trajectory(model, smap, losses, [batch]) == OneShot(levels=(0.6,)).trajectory(
        model, smap, losses, [batch]
    )
    several = GISP(levels=(0.6,), steps=10).trajectory(model, smap, losses, [batch])
    assert several.removed.tolist() != OneShot(levels=(0.6,)).trajectory(model, smap, losses, [batch]).removed.tolist()


def test_removed_parameters_grow_linearly_over_the_steps() -> None:
    model, smap, batch = setting((40, 40))
    trajectory = GISP(levels=(0.5,), steps=5).trajectory(model, smap, losses, [batch])
    largest = np.diff(trajectory.shares["parameters"], prepend=0).max()
    for step in range(1, 6):
        reached = trajectory.shares["parameters"][trajectory.step_of <= step][-1]
        assert 0.1 * step <= reached + 1e-12 < 0.1 * step + largest + 1e-12
    assert (np.diff(trajectory.step_of) >= 0).all()
    for step in range(1, 6):
        assert (np.diff(trajectory.scores[trajectory.step_of == step]) >= 0).all()


def test_ties_leave_in_the_fixed_order_and_silence_everywhere_is_announced() -> None:
    model, smap, batch = setting()
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.warns(UserWarning, match="all 18 structures score 0 in pruning step 1"):
        trajectory = GISP(levels=(0.5,), steps=1).trajectory(model, smap, losses, [batch])
    assert trajectory.removed.tolist() == sorted(trajectory.removed.tolist())


def test_dead_units_leave_first() -> None:
    model, smap, batch = setting()
    model[0].weight.data[[2, 5]] = 0
    model[0].bias.data[[2, 5]] = -1
    assert GISP(levels=(0.4,)).trajectory(model, smap, losses, [batch]).removed[:2].tolist() == [2, 5]


def test_protected_blocks_stay_whole_and_unknown_names_are_refused() -> None:
    model, smap, batch = setting()
    kept = GISP(levels=(0.4,), protect=("2",)).trajectory(model, smap, losses, [batch]).at(0.4).kept
    assert kept[10:].all()
    assert not kept[:10].all()
    with pytest.raises(ValueError, match=r"protect names no block inside 'conv'; prunable blocks are \['0', '2'\]"):
        GISP(protect=("conv",)).trajectory(model, smap, losses, [batch])


def test_protecting_a_layer_does_not_protect_those_whose_number_begins_with_its_own() -> None:
    model = nn.Sequential(nn.Linear(6, 8), *(m for _ in range(6) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2))
    smap = structure_map(model, torch.zeros(1, 6))
    names = [b.name for b in smap.blocks]
    assert {"1", "11"} <= set(names)
    for entry in ("1", "1."):
        kept = Random(levels=(0.5,), protect=(entry,)).trajectory(model, smap, None, [(torch.zeros(1, 6),)]).at(0.5).kept
        layers = dict(zip(names, np.split(kept, smap.starts[1:-1]), strict=True))
        assert layers["1"].all()
        assert not layers["11"].all()
    with pytest.raises(ValueError, match="protect names no block inside '1w'"):
        Random(protect=("1w",)).trajectory(model, smap, None, [(torch.zeros(1, 6),)])


def test_the_goal_of_a_step_is_met_by_the_fewest_that_do_and_in_little_memory() -> None:
    model = nn.Sequential(*(nn.Linear(50, 50) for _ in range(41)))
    smap = structure_map(model, torch.zeros(1, 50))
    rng = np.random.default_rng(0)
    kept = rng.random(len(smap)) < 0.9
    order = rng.permutation(np.flatnonzero(kept))
    shares = smap.share("parameters", np.concatenate([[smap.removed_counts(kept)], smap.after_each(kept, order)]))
    for number in (0, 1, 700, len(order)):
        assert _number_to_goal(smap, kept, order, float(shares[number])) == number
    assert _number_to_goal(smap, kept, order, 0.5) == np.searchsorted(shares, 0.5)
    tracemalloc.start()
    _number_to_goal(smap, kept, order, 0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(order) * len(smap.blocks) / 4


def test_a_level_out_of_reach_is_refused_with_the_largest_that_is_not() -> None:
    model, smap, batch = setting()
    with pytest.raises(CapacityError, match=r"level 0\.95 cannot be reached: at most (0\.\d+)") as error:
        GISP(levels=(0.2, 0.95), min_keep=2).trajectory(model, smap, losses, [batch])
    reach = float(str(error.value).split("at most ")[1].split()[0])
    total = (7 * 10) + (10 * 8 + 8) + 8 * 4
    assert reach == pytest.approx(1 - (7 * 2 + 2 * 2 + 2 + 2 * 4) / total, abs=1e-4)
    GISP(levels=(reach - 1e-3,), min_keep=2).trajectory(model, smap, losses, [batch])


def test_nothing_to_prune_is_a_capacity_error_that_says_why() -> None:
    model = nn.Linear(3, 2)
    smap = structure_map(model, torch.zeros(1, 3))
    batch = Batch(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(CapacityError, match=r"at most 0\.0000"):
        GISP().trajectory(model, smap, losses, [batch])
    assert len(GISP(levels=(0.0,)).trajectory(model, smap, losses, [batch]).removed) == 0


def test_an_empty_calibration_is_refused() -> None:
    model, smap, batch = setting()
    for batches in ([], [batch, Batch(batch.inputs[:0], batch.targets[:0])]):
        with pytest.raises(ValueError, match="at least one example"):
            GISP().trajectory(model, smap, losses, batches)


def test_a_diverged_model_names_step_and_batch_and_gets_its_mode_back() -> None:
    model, smap, batch = setting()
    model.train()
    model[4].weight.data[0, 0] = float("inf")
    with pytest.raises(FedsimError, match=r"pruning step 1: the loss of example \d+ of calibration batch 0"):
        GISP().trajectory(model, smap, losses, [batch])
    assert model.training
    assert not model[2]._forward_pre_hooks


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": ()}, "levels"),
        ({"levels": (0.4, 0.2)}, "levels"),
        ({"levels": (0.2, 0.2)}, "levels"),
        ({"levels": (0.2, 1.0)}, "levels"),
        ({"levels": (-0.1,)}, "levels"),
        ({"levels": (float("nan"),)}, "levels"),
        ({"steps": 0}, "steps must be a whole number, at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number, at least 1, got 2.5"),
        ({"min_keep": -1}, "min_keep must be at least 0, got -1"),
        ({"protect_last": -1}, "protect_last must be at least 0, got -1"),
        ({"protect_first": 1.0}, "protect_first must be a share"),
        ({"calibration_examples": 0}, "calibration_examples must be at least 1, got 0"),
        ({"calibration": "server"}, "calibration must be 'global' or 'client', got 'server'"),
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GISP(**fields)


def test_the_random_order_is_a_function_of_its_seed_alone() -> None:
    model, smap, batch = setting()
    other = Batch(batch.inputs + 1, batch.targets)
    first = Random(levels=(0.6,), seed=1).trajectory(model, smap, losses, [batch])
    assert first == Random(levels=(0.6,), seed=1).trajectory(model, smap, losses, [other])
    assert first.removed.tolist() != Random(levels=(0.6,), seed=2).trajectory(model, smap, losses, [batch]).removed.tolist()


def test_magnitude_removes_the_smallest_mean_square_first() -> None:
    model, smap, batch = setting()
    trajectory = Magnitude(levels=(0.6,)).trajectory(model, smap, losses, [batch])
    w0, b0, w1 = (p.detach().numpy() for p in (model[0].weight, model[0].bias, model[2].weight))
    first = ((w0**2).sum(1) + b0**2 + (w1**2).sum(0)) / (6 + 1 + 8)
    expected = [i for i in np.argsort(first).tolist() if i in trajectory.removed]
    assert [i for i in trajectory.removed.tolist() if i < 10] == expected


def test_client_windows_of_different_domains_give_different_submodels() -> None:
    model, smap, batch = setting((40, 40))
    flipped = Batch(-batch.inputs, batch.targets)
    one, two = (GISP(levels=(0.5,)).trajectory(model, smap, losses, [b]).at(0.5) for b in (batch, flipped))
    assert (one.kept != two.kept).any()
