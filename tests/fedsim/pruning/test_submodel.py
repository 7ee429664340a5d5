"""What one level costs, ships and refuses."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.errors import CapacityError, CheckpointError
from fedsim.pruning import PruningTrajectory, Random, Submodel, lacking, structure_map


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 3))


def random_order(model: nn.Module, level: float = 0.6):
    smap = structure_map(model, torch.zeros(1, 4))
    batch = (torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    return smap, Random(levels=(0.0, level)).trajectory(model, smap, lambda m, b: m(b[0]).sum(1), [batch])


def held(submodel: Submodel, smap) -> set[int]:
    return set(submodel.indices(smap).tolist())


def test_a_client_is_sent_exactly_the_scalars_it_does_not_hold_and_one_bit_per_structure() -> None:
    smap, trajectory = random_order(mlp())
    rng = np.random.default_rng(0)
    for _ in range(20):
        old, new = (Submodel(rng.random(len(smap)) < 0.6, smap.fingerprint) for _ in range(2))
        assert lacking(old, new, smap) == 4 * len(held(new, smap) - held(old, smap)) + 2
    small, large = trajectory.at(0.5), trajectory.at(0.2)
    assert lacking(large, small, smap) == 2, "shrinking along one trajectory ships the mask only"
    assert lacking(small, large, smap) == large.bytes(smap) - small.bytes(smap) + 2
    assert lacking(None, small, smap) == small.bytes(smap) + 2


def test_sparsity_counts_prunable_parameters_and_model_sparsity_all() -> None:
    smap, _ = random_order(mlp())
    bare = Submodel(np.zeros(len(smap), np.bool_), smap.fingerprint)
    total = (4 * 8 + 8) + (8 * 6 + 6) + (6 * 3 + 3)
    assert bare.sparsity(smap) == 1
    assert bare.parameters(smap) == 3, "only the bias of the logits belongs to no structure"
    assert bare.model_sparsity(smap) == pytest.approx(1 - 3 / total)


def test_another_model_is_refused_with_both_fingerprints() -> None:
    smap, trajectory = random_order(mlp())
    other, _ = random_order(mlp(9))
    submodel = trajectory.at(0.4)
    for use in (submodel.indices, submodel.parameters, trajectory.structures, lambda m: submodel.sliced(mlp(9), m)):
        with pytest.raises(ValueError, match=f"{smap.fingerprint}.*{other.fingerprint}"):
            use(other)
    with pytest.raises(ValueError, match=r"does not have the weights of this structure map.*'0.bias'"):
        submodel.sliced(mlp(9), smap)
    with pytest.raises(ValueError, match="does not have the weights"), submodel.masked(mlp().double(), smap):
        pass


def test_the_mask_is_lifted_also_after_an_exception() -> None:
    model = mlp()
    smap, trajectory = random_order(model)
    before = [p.clone() for p in model.parameters()]

    def fail_inside() -> None:
        with trajectory.at(0.5).masked(model, smap):
            assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_frozen_parameters_are_sliced_but_not_in_the_flat_vector() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    smap, trajectory = random_order(model)
    sliced = trajectory.at(0.5).sliced(model, smap)
    assert not sliced[0].weight.requires_grad
    vector = np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters() if p.requires_grad])
    small = np.concatenate([p.detach().numpy().reshape(-1) for p in sliced.parameters() if p.requires_grad])
    assert np.array_equal(trajectory.at(0.5).slice(vector, smap), small)
    assert trajectory.at(0.5).parameters(smap) == sum(p.numel() for p in sliced.parameters())


class Dense(nn.Parameter):
    """Never to be copied whole."""

    def __deepcopy__(self, memo):
        raise AssertionError("the dense weight was copied")


def test_surgery_copies_only_what_stays() -> None:
    model = mlp()
    smap, trajectory = random_order(model)
    expected = trajectory.at(0.5).sliced(model, smap)
    for layer in (0, 2, 4):
        model[layer].weight = Dense(model[layer].weight.detach())
    found = trajectory.at(0.5).sliced(model, smap)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert all(type(p) is nn.Parameter for p in found.parameters())


def test_levels_outside_the_trajectory_are_refused() -> None:
    _, trajectory = random_order(mlp(), level=0.5)
    with pytest.raises(CapacityError, match="lies beyond the trajectory"):
        trajectory.at(0.9)
    for level in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="level must lie in"):
            trajectory.at(level)
    with pytest.raises(ValueError, match="cost must be one of"):
        trajectory.at(0.3, "seconds")


def test_a_stored_trajectory_is_checked(tmp_path) -> None:
    smap, trajectory = random_order(mlp())
    other, _ = random_order(mlp(9))
    path = tmp_path / "order.json"
    trajectory.save(path)
    with pytest.raises(ValueError, match=f"{smap.fingerprint}, not of model {other.fingerprint}"):
        PruningTrajectory.load(path, other)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"order\.json"):
        PruningTrajectory.load(path)
    with pytest.raises(CheckpointError, match="missing"):
        PruningTrajectory.load(tmp_path / "none.json")
    path.write_text('{"format": "other/1"}')
    with pytest.raises(CheckpointError, match="other/1"):
        PruningTrajectory.load(path)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("removed", lambda order: [10**6, *order[1:]], r"removed structures must lie in 0\.\.13, got 1 to 1000000"),
        ("removed", lambda order: [-1, *order[1:]], "removed structures must lie in"),
        ("removed", lambda order: [order[1], *order[1:]], "a structure is removed twice"),
        ("scores", lambda scores: scores[1:], "its arrays must be of one length"),
        ("shares", lambda shares: {**shares, "bytes": [0.1]}, "its arrays must be of one length"),
    ],
)
def test_a_stored_order_that_cannot_be_one_is_damaged(tmp_path, field, change, message) -> None:
    smap, trajectory = random_order(mlp())
    path = tmp_path / "order.json"
    trajectory.save(path)
    assert PruningTrajectory.load(path, smap) == trajectory
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, field: change(value[field])}))
    with pytest.raises(CheckpointError, match=message):
        PruningTrajectory.load(path, smap)
