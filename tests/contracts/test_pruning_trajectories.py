"""Laws of every pruning method on every kind of model: nested, exact, surgery equals mask."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim.encoding import load, save
from fedsim.parameters import Layout
from fedsim.pruning import (
    FLAP,
    GISP,
    FirstOrder,
    LLMPruner,
    Magnitude,
    OneShot,
    Pruner,
    PruningTrajectory,
    Random,
    StructureMap,
    Submodel,
    Uniform,
    WandaSP,
    structure_map,
)

LEVELS = (0.0, 0.2, 0.4, 0.6, 0.7)


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 10, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(10, 12, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(48, 14), nn.ReLU(), nn.Linear(14, 5)),
    )


def unit(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU())


class ResNet9(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.down1 = unit(2, width), unit(width, 2 * width, 2)
        self.branch1 = nn.Sequential(unit(2 * width, 2 * width), unit(2 * width, 2 * width))
        self.down2, self.down3 = unit(2 * width, 2 * width), unit(2 * width, 4 * width, 2)
        self.branch2 = nn.Sequential(unit(4 * width, 4 * width), unit(4 * width, 4 * width))
        self.head = nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(self.stem(x))
        x = x + self.branch1(x)
        x = self.down3(self.down2(x))
        x = x + self.branch2(x)
        x = F.adaptive_max_pool2d(x, 1).flatten(1)
        return self.head(x) * 0.125


class DepthwiseResidual(nn.Module):
    """BatchNorm with warmed-up statistics, a depthwise convolution inside the branch, a view before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 9, 3, padding=1), nn.BatchNorm2d(9)
        self.expand, self.norm1 = nn.Conv2d(9, 15, 1), nn.BatchNorm2d(15)
        self.depthwise, self.norm2 = nn.Conv2d(15, 15, 3, padding=1, groups=15), nn.BatchNorm2d(15)
        self.project = nn.Conv2d(15, 9, 1)
        self.fc, self.head = nn.Linear(9 * 16, 11), nn.Linear(11, 5)
        generator = torch.Generator().manual_seed(7)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.bias.data.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.hardswish(self.norm1(self.expand(x)))
        x = x + self.project(torch.relu(self.norm2(self.depthwise(y))))
        x = F.avg_pool2d(x, 2)
        return self.head(F.silu(self.fc(x.view(x.size(0), -1))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "mlp": (mlp, (12,), False),
    "cnn": (cnn, (2, 8, 8), False),
    "resnet9": (ResNet9, (2, 8, 8), False),
    "resnet9-streams": (ResNet9, (2, 8, 8), True),
    "depthwise": (DepthwiseResidual, (2, 8, 8), False),
    "depthwise-streams": (DepthwiseResidual, (2, 8, 8), True),
}
PRUNERS: dict[str, Callable[..., Pruner]] = {
    "gisp": lambda **fields: GISP(steps=4, **fields),
    "gisp-weights": lambda **fields: GISP(steps=3, importance=FirstOrder(aggregate="sum_abs", reduce="mean_then_abs"), **fields),
    "one-shot": OneShot,
    "magnitude": Magnitude,
    "random": lambda **fields: Random(seed=3, **fields),
    "cut-out": lambda **fields: GISP(steps=3, importance=FirstOrder(compact=True), **fields),
    "wanda-sp": WandaSP,
    "flap": FLAP,
    "llm-pruner": LLMPruner,
    "uniform": lambda **fields: Uniform(base=GISP(steps=1), **fields),
}


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, StructureMap, list[Batch]]:
    build, shape, couple = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().to(dtype)
        inputs, targets = torch.randn(24, *shape, dtype=dtype), torch.randint(0, 5, (24,))
    return (
        model,
        structure_map(model, inputs[:1], couple_residual=couple),
        [Batch(inputs[:10], targets[:10]), Batch(inputs[10:], targets[10:])],
    )


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PRUNERS)
def pruner(request: pytest.FixtureRequest) -> Callable[..., Pruner]:
    return PRUNERS[request.param]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_sliced_module_computes_what_the_masked_one_does(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, smap, batches = case(name, dtype)
    trajectory = GISP(levels=LEVELS, steps=4).trajectory(model, smap, losses, batches)
    model.eval()
    inputs = batches[0].inputs
    for level in LEVELS:
        submodel = trajectory.at(level)
        with torch.no_grad(), submodel.masked(model, smap):
            masked = model(inputs)
        with torch.no_grad():
            sliced = submodel.sliced(model, smap)(inputs)
        assert (masked - sliced).abs().max() <= tolerance
        assert (sliced - model(inputs)).abs().max() > 1e-3 or level == 0, "nothing was removed, so the comparison says nothing"


def test_level_0_is_bit_identical(name: str) -> None:
    model, smap, batches = case(name)
    submodel = GISP(levels=(0.0, 0.4), steps=2).trajectory(model, smap, losses, batches).at(0.0)
    model.eval()
    with torch.no_grad():
        assert torch.equal(submodel.sliced(model, smap)(batches[0].inputs), model(batches[0].inputs))
    assert submodel.sparsity(smap) == 0
    assert submodel.kept.all()


def test_counts_of_every_level_are_those_of_the_sliced_module(name: str) -> None:
    model, smap, batches = case(name)
    trajectory = Random(levels=LEVELS, seed=1).trajectory(model, smap, losses, batches)
    for level in LEVELS:
        submodel = trajectory.at(level)
        sliced = submodel.sliced(model, smap).eval()
        assert submodel.parameters(smap) == sum(p.numel() for p in sliced.parameters())
        assert submodel.bytes(smap) == sum(p.numel() * p.itemsize for p in sliced.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            sliced(batches[0].inputs[:1])
        assert submodel.flops(smap) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet9", "resnet9-streams"])
def test_indices_into_the_flat_vector_name_the_sliced_parameters(name: str) -> None:
    model, smap, batches = case(name)
    trajectory = Random(levels=LEVELS).trajectory(model, smap, losses, batches)
    vector = Layout.of(model).flatten(model)
    for level in LEVELS:
        submodel = trajectory.at(level)
        sliced = submodel.sliced(model, smap)
        assert np.array_equal(Layout.of(sliced).flatten(sliced), vector[submodel.indices(smap)])


def test_every_level_contains_all_higher_ones(name: str, pruner: Callable[..., Pruner]) -> None:
    model, smap, batches = case(name)
    trajectory = pruner(levels=(0.0, 0.7)).trajectory(model, smap, losses, batches)
    levels = np.sort(np.random.default_rng(0).uniform(0, 0.7, 50))
    kept = [trajectory.at(float(level)).kept for level in levels]
    assert all((higher <= lower).all() for lower, higher in pairwise(kept))
    assert len(np.unique(trajectory.removed)) == len(trajectory.removed)


def test_a_level_is_hit_from_below_by_less_than_one_structure(name: str, pruner: Callable[..., Pruner]) -> None:
    model, smap, batches = case(name)
    trajectory = pruner(levels=LEVELS).trajectory(model, smap, losses, batches)
    for cost, share in trajectory.shares.items():
        for level in (fraction * share[-1] for fraction in (0.2, 0.5, 0.9)):
            submodel = trajectory.at(level, cost)
            number = int((~submodel.kept).sum())
            achieved = float(smap.share(cost, smap.removed_counts(submodel.kept)))
            assert achieved <= level + 1e-12
            assert number == len(share) or share[number] > level


def test_scatter_of_slice_keeps_what_is_kept_and_touches_nothing_else(name: str) -> None:
    model, smap, batches = case(name)
    submodel = Random(levels=(0.5,)).trajectory(model, smap, losses, batches).at(0.5)
    size = sum(p.numel() for p in model.parameters())
    vector, other = np.random.default_rng(0).normal(size=(2, size))
    merged = submodel.scatter(submodel.slice(vector, smap), other, smap)
    inside = np.isin(np.arange(size), submodel.indices(smap))
    assert np.array_equal(merged[inside], vector[inside])
    assert np.array_equal(merged[~inside], other[~inside])
    assert 0 < inside.sum() < size


def test_the_model_and_its_modes_and_gradients_are_untouched(name: str, pruner: Callable[..., Pruner]) -> None:
    model, smap, batches = case(name)
    model.train()
    next(model.children()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    trajectory = pruner(levels=(0.5,)).trajectory(model, smap, losses, batches)
    with trajectory.at(0.5).masked(model, smap):
        pass
    trajectory.at(0.5).sliced(model, smap)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_values_survive_saving(tmp_path, pruner: Callable[..., Pruner]) -> None:
    model, smap, batches = case("cnn")
    method = pruner(levels=LEVELS)
    trajectory = method.trajectory(model, smap, losses, batches)
    trajectory.save(tmp_path / "order.json")
    assert PruningTrajectory.load(tmp_path / "order.json", smap) == trajectory
    save(tmp_path / "values.npz", (method, trajectory, trajectory.at(0.4)))
    assert load(tmp_path / "values.npz") == (method, trajectory, trajectory.at(0.4))
    assert trajectory.at(0.4) != trajectory.at(0.6)


def test_the_same_call_gives_the_same_order(name: str, pruner: Callable[..., Pruner]) -> None:
    model, smap, batches = case(name)
    method = pruner(levels=LEVELS)
    assert method.trajectory(model, smap, losses, batches) == method.trajectory(copy.deepcopy(model), smap, losses, batches)


def test_every_block_keeps_at_least_min_keep(pruner: Callable[..., Pruner]) -> None:
    model, smap, batches = case("mlp")
    trajectory = pruner(levels=(0.85,), min_keep=3).trajectory(model, smap, losses, batches)
    kept = np.diff(smap.starts) - smap.removed_counts(trajectory.at(0.85).kept)
    assert (kept >= 3).all()


def test_a_dense_submodel_is_the_whole_model(name: str) -> None:
    model, smap, _ = case(name)
    dense = Submodel.dense(smap)
    assert dense.parameters(smap) == sum(p.numel() for p in model.parameters())
    assert np.array_equal(dense.indices(smap), np.arange(dense.parameters(smap)))
