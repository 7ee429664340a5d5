"""Lanes are only a faster loop: equal results for every strategy and model family, and bits that no co-member, padding or idler can move."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from fedsim.communication import ErrorFeedback, FedSGD, TopK, Uniform
from fedsim.dense import DenseBlock, is_dense
from fedsim.errors import CapacityError, ClientError
from fedsim.fleet import Fleet
from fedsim.lanes import LaneBlock, LoopBlock, for_loop, lanes_for, pooled_first
from fedsim.mounted import Mounted, mounted
from fedsim.parameters import Layout
from fedsim.partition import Dirichlet
from fedsim.randomness import torch_seeded
from fedsim.rounds import Training
from fedsim.runtime import SerialExecutor
from fedsim.stacked import StackedBlock, is_stacked
from fedsim.strategies import FedAdam, FedAvg, FedAvgM, FedDyn, FedNova, FedProx, FedYogi, Scaffold
from fedsim.tasks.base import Batch, Dataset, Splits, Task

# ---------------------------------------------------------------- one task, five families of models


@dataclass(frozen=True)
class Pictures(Task):
    """Ten labels as noisy 8 x 8 pictures, seen by a model of the named family."""

    family: str = "perceptron"
    num: int = 240
    num_classes: int = 10

    def load(self) -> Splits:
        rng = np.random.default_rng(0)
        labels = np.arange(self.num) % 10
        inputs = rng.normal(size=(10, 1, 8, 8))[labels] + 0.5 * rng.normal(size=(self.num, 1, 8, 8))
        data = Dataset(inputs.astype(np.float32), labels)
        return Splits(data, data)

    def build(self, seed: int) -> nn.Module:
        with torch_seeded(seed, "model"):
            return MODELS[self.family]()


def _norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 8, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _pools() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


@dataclass(frozen=True, kw_only=True)
class Pulled(FedAvg):
    """Every local step is shifted against the signs of the first model."""

    def init(self, params):
        return params

    def shift(self, client, server):
        return torch.from_numpy(0.05 * np.sign(server)).repeat(len(client), 1)


MODELS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 12, bias=False), nn.Linear(12, 10)),
    "smooth": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 10)),
    "norms": _norms,
    "pools": _pools,
}
PROGRAMS = {"linear": DenseBlock, "perceptron": DenseBlock, "smooth": LaneBlock, "norms": StackedBlock, "pools": StackedBlock}
RULES = {
    "plain": FedAvg(),
    "momentum": FedAvg(momentum=0.9),
    "decay": FedAvg(weight_decay=0.05),
    "momentum and decay": FedAvg(momentum=0.9, weight_decay=0.05),
    "clip": FedAvg(clip=0.5),
    "everything": FedProx(mu=0.5, momentum=0.5, weight_decay=0.05, clip=0.5),
    "prox": FedProx(mu=0.5),
    "scaffold": Scaffold(),
    "shift and momentum": Pulled(momentum=0.5, weight_decay=0.05),
    "nova": FedNova(local_epochs=1.5),
    "dyn": FedDyn(alpha=0.1),
    "epochs": FedAvg(local_epochs=1.5, momentum=0.9, weight_decay=0.05),
    "epochs, clip": FedAvg(local_epochs=1.5, clip=0.5),
    "server momentum": FedAvgM(),
    "adam": FedAdam(server_lr=0.01),
    "yogi": FedYogi(server_lr=0.01),
    "compressed": FedAvg(compression=ErrorFeedback(inner=TopK(share=0.3))),
}


def trained(family: str, rule: FedAvg, lanes: int, *, seed: int = 1, schedule=None, rounds: int = 3, device: str = "cpu") -> np.ndarray:
    columns = dict.fromkeys(("flops", "memory", "up", "down"), np.full(16, 1e9))
    settings = {**rule.__dict__, "client_lr": 0.1, "cohort": 7, "local_steps": 6, "batch_size": 5}
    training = Training.prepare(
        task=Pictures(family),
        fleet=Fleet.from_table(columns, partition=Dirichlet(alpha=1.0, minimum=8)),
        strategy=type(rule)(**settings),
        communication=schedule or Uniform(),
        rounds=rounds,
        seed=seed,
        executor=SerialExecutor(),
        lanes=lanes,
        device=device,
    )
    state = training.init()
    for _ in range(rounds):
        state, _ = training.step(state)
    return state.params


# ---------------------------------------------------------------- the loop is the reference


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("family", MODELS)
def test_lanes_end_where_the_loop_ends(family, rule):
    loop, lanes = (trained(family, rule, width, rounds=2) for width in (1, 4))
    assert_allclose(lanes, loop, rtol=0, atol=1e-4 if family == "pools" else 1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_lanes_that_merge_after_every_step_end_where_the_loop_ends(family):
    rule = FedAvg(momentum=0.9)
    assert_allclose(
        trained(family, rule, 8, schedule=FedSGD()),
        trained(family, rule, 1, schedule=FedSGD()),
        rtol=0,
        atol=1e-4 if family == "pools" else 1e-5,
    )


@pytest.mark.parametrize("family", MODELS)
def test_other_batches_are_seen_by_these_tolerances(family):
    assert np.abs(trained(family, FedAvg(), 4, seed=2, rounds=1) - trained(family, FedAvg(), 4, rounds=1)).max() > 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_computed_by_the_program_meant_for_it(family):
    task = Pictures(family)
    model, data = task.build(0), task.data().train
    assert (is_dense(task, model, data), is_stacked(task, model, data)) == (
        PROGRAMS[family] is DenseBlock,
        PROGRAMS[family] is StackedBlock,
    )


# ---------------------------------------------------------------- a client's bits are its own


@dataclass(frozen=True)
class Bench:
    """Blocks of one family under one rule, from one start; client c takes 4 steps on batches of its own."""

    family: str
    rule: FedAvg
    steps: int = 4

    @cached_property
    def task(self) -> Pictures:
        return Pictures(self.family)

    @cached_property
    def model(self) -> nn.Module:
        return self.task.build(0).train()

    def rows(self, clients: list[int]) -> np.ndarray:
        return np.stack([np.random.default_rng(c).integers(0, 240, (self.steps, 6)) for c in clients])

    def ends(self, clients: list[int], *, taken: list[int] | None = None, program: type[LaneBlock] | None = None) -> np.ndarray:
        """Where ``clients`` end that share a block of 16 lanes, each after as many steps as ``taken`` says."""
        layout = Layout.of(self.model)
        block = (program or PROGRAMS[self.family])(self.task, self.model, self.rule, layout, np.array(clients), None, 16)
        shift = self.rule.shift(_kept(clients, self.rule.client_size(layout.size)), self.rule.init(layout.flatten(self.model)))
        block.load(torch.from_numpy(layout.flatten(self.model)), shift)
        active = np.arange(self.steps)[:, None] < np.array(taken or [self.steps] * len(clients))
        block.train(self.task.data().train, self.rows(clients), 0, active)
        return block.ends().numpy()


def _kept(clients: list[int], size: int) -> torch.Tensor:
    draws = [torch.randn(size, generator=torch.Generator().manual_seed(c)) for c in clients]
    return 0.1 * torch.stack(draws)


FULL = list(range(16))
LOCAL = [name for name in RULES if name not in ("nova", "epochs", "server momentum", "adam", "yogi", "compressed")]


@cache
def full_block(family: str, rule: str) -> np.ndarray:
    return Bench(family, RULES[rule]).ends(FULL)


@pytest.mark.parametrize("rule", LOCAL)
@pytest.mark.parametrize("family", MODELS)
def test_a_client_ends_with_the_same_bits_whoever_shares_its_block_and_however_many(family, rule):
    bench = Bench(family, RULES[rule])
    for clients in ([0], [3, 9], [5, 4, 3], [15, 2, 7, 11, 0], list(range(13)), FULL[::-1]):
        assert_array_equal(bench.ends(clients), full_block(family, rule)[clients])


@pytest.mark.parametrize("rule", LOCAL)
@pytest.mark.parametrize("family", MODELS)
def test_a_client_ends_with_the_same_bits_whether_or_not_others_idle(family, rule):
    taken = [1, 4, 2, 4, 3, 4, 4, 1]
    ends = Bench(family, RULES[rule]).ends(FULL[:8], taken=taken)
    done = np.array(taken) == 4
    assert_array_equal(ends[done], full_block(family, rule)[:8][done])
    two_steps = Bench(family, RULES[rule], steps=4).ends([2], taken=[2])
    assert_array_equal(ends[2], two_steps[0])
    assert not np.array_equal(ends[2], full_block(family, rule)[2])


class Unpadded(StackedBlock):
    @staticmethod
    def width_of(count: int, lanes: int) -> int:
        return count


def test_a_single_lane_of_convolutions_would_round_otherwise_without_padding():
    assert not np.array_equal(Bench("pools", FedAvg()).ends([0], program=Unpadded), full_block("pools", "plain")[[0]])


def test_a_client_given_the_batches_of_another_ends_elsewhere():
    bench = Bench("perceptron", FedAvg(client_lr=0.1))
    a, b = bench.ends([1, 2])
    assert np.abs(a - b).max() > 1e-3


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("family", MODELS)
def test_a_gpu_ends_where_the_processor_ends(family, rule):
    expected = trained(family, rule, 1, rounds=2)
    for lanes in (1, 4):
        assert_allclose(trained(family, rule, lanes, rounds=2, device="cuda"), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_training_on_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(CapacityError, match="gpus_per_worker"):
        trained("linear", FedAvg(), 1, device="cuda")
    with pytest.raises(ValueError, match="'gpu'"):
        trained("linear", FedAvg(), 1, device="gpu")


@pytest.mark.parametrize("room", [0, 10**9])
def test_mounted_examples_are_those_of_the_data_set(room):
    data = Pictures().data().train
    examples = Mounted(data, torch.device("cpu"), room)
    for found, expected in zip(examples.batch([3, 7, 3]), data.batch([3, 7, 3]), strict=True):
        assert_array_equal(found.numpy(), expected.numpy())
        assert found.dtype == expected.dtype
    with pytest.raises(IndexError, match="240"):
        examples.batch([0, 240])
    assert mounted(data, torch.device("cpu"), {}) is data


def test_the_rule_for_widths_on_a_gpu_batches_large_pictures_too():
    large = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10))
    batch = Batch(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    assert lanes_for(Pictures(), large, batch) == 1
    assert lanes_for(Pictures(), large, batch, "cuda") == 32


# ---------------------------------------------------------------- what raises is named


@dataclass(frozen=True)
class Mislabelled(Pictures):
    """One example's label is not among the classes."""

    def load(self) -> Splits:
        train, test = super().load()
        targets = train.targets.copy()
        targets[77] = 11
        return Splits(Dataset(train.inputs, targets, {"label": train.targets}), test)


@pytest.mark.parametrize("family", ["perceptron", "pools", "smooth"])
def test_a_label_outside_the_classes_names_its_client_and_the_step_as_the_loop_does(family):
    found = []
    for lanes in (1, 8):
        columns = dict.fromkeys(("flops", "memory", "up", "down"), np.full(8, 1e9))
        training = Training.prepare(
            task=Mislabelled(family),
            fleet=Fleet.from_table(columns, partition=Dirichlet(alpha=100.0, minimum=20)),
            strategy=FedAvg(cohort=8, local_epochs=1.0, batch_size=5),
            communication=Uniform(),
            rounds=1,
            seed=0,
            executor=SerialExecutor(),
            lanes=lanes,
        )
        with pytest.raises(ClientError) as raised:
            training.step(training.init())
        found.append((raised.value.client, raised.value.step))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]


# ---------------------------------------------------------------- pooling before the ReLU


def _gradients(task: Task, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses.mean(), list(model.parameters()))]


def test_pooling_before_the_relu_gives_the_same_losses_and_gradients_to_the_bit():
    task = Pictures("pools")
    model = task.build(0)
    moved = pooled_first(task, model)
    assert [type(m) for m in moved][1:3] == [nn.MaxPool2d, nn.ReLU]
    inputs, targets = task.data().train.batch(np.arange(40))
    inputs = inputs.round()  # many ties
    for a, b in zip(_gradients(task, model, inputs, targets), _gradients(task, moved, inputs, targets), strict=True):
        assert_array_equal(a.numpy(), b.numpy())


@dataclass(frozen=True)
class Features(Pictures):
    def logits(self, model, inputs):
        return model[4:](model[:4](inputs).relu())


def test_a_model_that_somebody_looks_into_stays_as_it_is():
    task = Pictures("pools")
    model = task.build(0)
    assert pooled_first(Features("pools"), model) is model
    model[1].register_forward_hook(lambda *_: None)
    assert pooled_first(task, model) is model
    perceptron = Pictures("perceptron").build(0)
    assert pooled_first(Pictures("perceptron"), perceptron) is perceptron


def test_the_loop_leaves_the_names_of_the_parameters_alone():
    task = Pictures("pools")
    model = for_loop(task.build(0))
    block = LoopBlock(task, model, pooled_first(task, model), FedAvg(), Layout.of(model), 0, None, 0, 0)
    assert [tuple(w.shape) for w in block.weights] == [tuple(p.shape) for p in model.parameters()]
    assert {id(p) for p in block.model.parameters()} == {id(p) for p in model.parameters()}
