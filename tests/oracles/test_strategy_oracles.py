"""Federated strategies on losses h/2 (w - a)^2, through the engine and against closed forms and loops over plain numbers.

Three clients with curvatures h = (1, 2, 4), optima a = (0, 1, 3) and weights p = (.5, .3, .2); the optimum of the weighted sum is
1.5789..., that of the plain sum 2.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from fedsim.communication import FedSGD, Uniform
from fedsim.fleet import Fleet
from fedsim.rounds import Training
from fedsim.runtime import SerialExecutor
from fedsim.shards import Shards
from fedsim.strategies import Due, FedAdam, FedAvg, FedAvgM, FedDyn, FedNova, FedProx, FedYogi, Scaffold, Trained
from fedsim.tasks.base import Dataset, Splits, Task

H, A, P = np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, 3.0]), np.array([0.5, 0.3, 0.2])
OPTIMUM, PLAIN_OPTIMUM = 1.5789473684210527, 2.0


@dataclass(frozen=True)
class Sizes:
    sizes: tuple[int, ...] = (5, 3, 2)
    key: str | None = None

    def split(self, dataset, num_clients, seed):
        return Shards(np.arange(len(dataset)), np.concatenate([[0], np.cumsum(self.sizes)]))


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, inputs):
        return self.w.expand(len(inputs))


@dataclass(frozen=True)
class Quadratics(Task):
    num_classes: int = 1

    def load(self):
        rows = np.repeat(np.stack([H, A], axis=1), (5, 3, 2), axis=0)
        data = Dataset(rows, np.zeros(len(rows), np.int64))
        return Splits(data, data)

    def build(self, seed):
        return Scalar()

    def losses(self, model, batch):
        return batch.inputs[:, 0] / 2 * (model(batch.inputs) - batch.inputs[:, 1]) ** 2

    def correct(self, model, batch):
        return torch.zeros(len(batch.inputs))


def train(strategy, rounds, communication=None, lanes=1):
    """The model after every round, and the last state."""
    columns = dict.fromkeys(("flops", "memory", "up", "down"), np.full(3, 1e9))
    training = Training.prepare(
        task=Quadratics(),
        fleet=Fleet.from_table(columns, partition=Sizes()),
        strategy=strategy,
        communication=communication or Uniform(),
        rounds=rounds,
        seed=0,
        executor=SerialExecutor(),
        evaluate_every=rounds,
        lanes=lanes,
    )
    state, path = training.init(), []
    while state.round < rounds:
        state, _ = training.step(state)
        path.append(float(state.params[0]))
    return np.array(path), state, training


PLAIN = {"client_lr": 0.1, "cohort": 3, "local_steps": 5, "batch_size": 1}


def test_fedprox_with_exact_local_solves_is_the_weighted_mean_of_its_proximal_points():
    path, *_ = train(FedProx(**{**PLAIN, "client_lr": 0.2, "local_steps": 110}, mu=0.5), 25, lanes=4)
    c = H / (H + 0.5)
    assert path[-1] == pytest.approx((P * c * A).sum() / (P * c).sum(), rel=1e-12)
    assert path[-1] == pytest.approx(1.0295857988165682, rel=1e-12)


def test_fedprox_without_its_term_is_federated_averaging_bit_for_bit():
    assert (train(FedProx(**PLAIN, mu=0.0), 4)[0] == train(FedAvg(**PLAIN), 4)[0]).all()


@pytest.mark.parametrize(("weighting", "optimum"), [("samples", OPTIMUM), ("uniform", PLAIN_OPTIMUM)])
def test_scaffold_reaches_the_optimum_where_federated_averaging_does_not(weighting, optimum):
    assert train(Scaffold(**PLAIN, weighting=weighting), 150, lanes=4)[0][-1] == pytest.approx(optimum, rel=1e-12)
    assert abs(train(FedAvg(**PLAIN, weighting=weighting), 50, lanes=4)[0][-1] - optimum) > 0.2


def test_scaffold_with_two_of_three_clients_a_round_still_reaches_it():
    path, *_ = train(replace(Scaffold(**PLAIN, weighting="uniform"), cohort=2), 300, lanes=4)
    assert path[-1] == pytest.approx(PLAIN_OPTIMUM, rel=1e-9)


def scaffold_by_hand(rounds, cohorts, rate=0.1, steps=5):
    """Algorithm 1 over plain numbers, equal weights."""
    w, c, own, path = 0.0, 0.0, np.zeros(3), []
    for cohort in cohorts[:rounds]:
        ends, changes = [], []
        for i in cohort:
            x = w
            for _ in range(steps):
                x -= rate * (H[i] * (x - A[i]) - own[i] + c)
            new = own[i] - c + (w - x) / (steps * rate)
            ends.append(x)
            changes.append(new - own[i])
            own[i] = new
        w = np.mean(ends)
        c += len(cohort) / 3 * np.mean(changes)
        path.append(w)
    return np.array(path)


@pytest.mark.parametrize("lanes", [1, 4])
def test_scaffold_follows_its_algorithm_with_states_kept_over_rounds(lanes):
    strategy = replace(Scaffold(**PLAIN, weighting="uniform"), cohort=2)
    path, _, training = train(strategy, 12, lanes=lanes)
    assert_allclose(path, scaffold_by_hand(12, [training.draw(r, 0.0)[0] for r in range(12)]), rtol=1e-12)


def test_each_merge_of_a_uniform_interval_is_a_round_of_scaffold():
    inside = train(Scaffold(**PLAIN, weighting="uniform"), 2, Uniform(interval=1))[0]
    assert_allclose(inside[1], scaffold_by_hand(10, [range(3)] * 10, steps=1)[-1], rtol=1e-12)


def test_control_variates_that_start_at_random_miss_the_optimum():
    class Careless(Scaffold):
        def init(self, params):
            return np.full_like(params, 0.7)

    path, *_ = train(Careless(**PLAIN, weighting="uniform"), 100, lanes=4)
    assert abs(path[-1] - PLAIN_OPTIMUM) > 0.05


def nova_by_hand(rate, taus, rounds):
    w = 0.0
    for _ in range(rounds):
        ends = [A[i] + (w - A[i]) * (1 - rate) ** tau for i, tau in enumerate(taus)]
        w -= (P * taus).sum() * sum(p * (w - x) / tau for p, x, tau in zip(P, ends, taus, strict=True))
    return w


def nova_by_strategy(rate, taus, rounds, momentum=0.0):
    strategy, w = FedNova(client_lr=rate, momentum=momentum), np.zeros(1)
    due = Due(np.arange(3), P, 1.0)
    for _ in range(rounds):
        ends = np.array([A[i] + (w[0] - A[i]) * (1 - rate) ** tau for i, tau in enumerate(taus)])
        trained = Trained(torch.tensor(w), torch.tensor(ends)[:, None], torch.tensor(taus), torch.empty(3, 0), None)
        w, _ = strategy.server(w, None, P @ strategy.finish(trained)[0].numpy(), due, True)
    return w[0]


@pytest.mark.parametrize(
    ("rate", "fixed", "rounds"), [(0.1, 0.6109219855898065, 400), (0.01, 0.8608682161830069, 1500), (0.001, 0.8959638564, 8000)]
)
def test_fednova_weighs_steps_out_of_the_fixed_point(rate, fixed, rounds):
    taus = np.array([1, 5, 20])
    assert nova_by_strategy(rate, taus, rounds) == pytest.approx(fixed, rel=1e-9)
    assert nova_by_hand(rate, taus, rounds) == pytest.approx(fixed, rel=1e-9)


def test_fednovas_weight_of_steps_under_momentum():
    assert FedNova(momentum=0.9).accumulated(torch.tensor([1, 5, 20])).tolist() == pytest.approx(
        [1.0, 13.1441, 120.94189891315123], rel=1e-12
    )


def test_fednova_with_equal_steps_is_federated_averaging():
    assert_allclose(train(FedNova(**PLAIN), 5)[0], train(FedAvg(**PLAIN), 5)[0], rtol=1e-14)


@pytest.mark.parametrize("lanes", [1, 4])
def test_unequal_local_epochs_give_each_client_its_own_steps(lanes):
    """Shards of 5, 3 and 2 examples, two passes: 10, 6 and 4 steps."""
    taus = np.array([10, 6, 4])
    w, plain = 0.0, 0.0
    for _ in range(3):
        x, y = ([A[i] + (v - A[i]) * (1 - 0.1 * H[i]) ** taus[i] for i in range(3)] for v in (w, plain))
        w -= (P * taus).sum() * (P * (w - np.array(x)) / taus).sum()
        plain = (P * np.array(y)).sum()
    strategy = FedNova(**PLAIN, local_epochs=2.0)
    path, _, training = train(strategy, 3, lanes=lanes)
    assert path[-1] == pytest.approx(w, rel=1e-12)
    assert train(FedAvg(**PLAIN, local_epochs=2.0), 3, lanes=lanes)[0][-1] == pytest.approx(plain, rel=1e-12)
    _, record = training.step(training.init())
    assert record.clients["train_loss"][1] == pytest.approx(np.mean([(1 - 0.2) ** (2 * t) for t in range(6)]), rel=1e-12)


@pytest.mark.parametrize("cohort", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_feddyn_with_exact_local_solves_reaches_the_optimum(cohort):
    strategy = FedDyn(client_lr=0.2, cohort=cohort, local_steps=60, batch_size=1, alpha=0.5, weighting="uniform")
    path, state, training = train(strategy, 80 if cohort == 3 else 200, lanes=4)
    assert path[-1] == pytest.approx(PLAIN_OPTIMUM, rel=1e-6)
    kept = training.log.read(state.clients, np.arange(3))[:, 0]
    assert_allclose(kept, [2.0, 2.0, -4.0], atol=1e-5)  # the gradients of the clients' losses there
    assert_allclose(state.server, 0.0, atol=1e-5)


def test_feddyns_proximal_term_acts_from_the_second_step_on():
    one, two = (train(FedDyn(**{**PLAIN, "local_steps": n}, alpha=0.5), 1)[0] for n in (1, 2))
    free_one, free_two = (train(FedAvg(**{**PLAIN, "local_steps": n}), 1)[0] for n in (1, 2))
    move = lambda w: w / 2  # noqa: E731 - the server's h = -alpha w doubles the first merge
    assert_allclose(move(one), free_one, rtol=1e-12)
    assert abs(move(two) - free_two)[0] > 1e-3


D = np.array([1.0, -0.5, 0.25])
EVERYONE = Due(np.arange(3), P, 1.0)


def two_steps(strategy):
    params, state = np.ones(1), None
    state = strategy.init(params)
    for difference in D:
        params, state = strategy.server(params, state, params + difference, EVERYONE, True)
    return params[0] - 1


@pytest.mark.parametrize(
    ("strategy", "moved"), [(FedAdam(server_lr=0.1), 0.18783973965374948), (FedYogi(server_lr=0.1), 0.18724595023132012)]
)
def test_adaptive_servers_move_as_published(strategy, moved):
    assert two_steps(strategy) == pytest.approx(moved, rel=1e-9)


def test_server_momentum_accumulates():
    assert two_steps(FedAvgM(beta=0.9)) == pytest.approx(2.01, rel=1e-12)
    assert two_steps(FedAvgM(beta=0.0)) == pytest.approx(D.sum(), rel=1e-12)


def test_flowers_adaptive_servers_differ_from_ours_as_documented():
    """Flower corrects the bias in FedAdam and starts v at 0 in both: written out, its two rules give the figures it is known for."""
    m = v = w = 0.0
    for t, d in enumerate(D, start=1):
        m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d**2
        w += 0.1 * np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1)) * m / (np.sqrt(v) + 1e-3)
    assert w == pytest.approx(0.1268802535, rel=1e-6)
    assert abs(w - two_steps(FedAdam(server_lr=0.1))) > 0.05


@pytest.mark.parametrize("communication", [FedSGD(), Uniform(interval=2)])
def test_server_momentum_counts_every_merge(communication):
    path, *_ = train(FedAvgM(**PLAIN, beta=0.5), 1, communication)
    w, m = 0.0, 0.0
    lengths = [1] * 5 if communication == FedSGD() else [2, 2, 1]
    for steps in lengths:
        mean = (P * (A + (w - A) * (1 - 0.1 * H) ** steps)).sum()
        m = 0.5 * m + (mean - w)
        w += m
    assert path[-1] == pytest.approx(w, rel=1e-12)
