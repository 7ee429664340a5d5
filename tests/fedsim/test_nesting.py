"""Nested submodels in one cohort, against a loop written out for perceptrons: slices of the weights, means over their holders."""

from dataclasses import dataclass
from math import ceil

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from fedsim.communication import FedSGD, Intervals, Uniform
from fedsim.encoding import digest
from fedsim.fleet import Fleet
from fedsim.local_training import example_order
from fedsim.nesting import Widths
from fedsim.partition import IID
from fedsim.rounds import Training
from fedsim.runtime import SerialExecutor
from fedsim.strategies import FedAvg, HeteroFL
from fedsim.tasks.base import Dataset, Splits, Task

HIDDEN, RATES = 11, (1.0, 0.5, 0.2)


@dataclass(frozen=True)
class Clouds(Task):
    hidden: int = HIDDEN
    num_classes: int = 4

    def load(self):
        rng = np.random.default_rng(0)
        labels = np.arange(120) % 4
        data = Dataset(rng.normal(size=(4, 6))[labels] + rng.normal(size=(120, 6)), labels)
        return Splits(data, data)

    def build(self, seed):
        generator = torch.Generator().manual_seed(seed)
        layers = [nn.Linear(6, self.hidden, dtype=torch.float64), nn.ReLU(), nn.Linear(self.hidden, 4, dtype=torch.float64)]
        model = nn.Sequential(*layers)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
        return model


def prepared(communication=None, *, strategy=None, **options):
    defaults = {"client_lr": 0.1, "cohort": 7, "local_steps": 6, "batch_size": 5}
    strategy = strategy or HeteroFL(**defaults, widths=Widths(rates=RATES, shares=(1, 1, 1)))
    return Training.prepare(
        task=Clouds(),
        fleet=Fleet.sample(12, partition=IID(), seed=0),
        strategy=strategy,
        communication=communication or Uniform(),
        rounds=3,
        seed=1,
        executor=SerialExecutor(),
        **{"lanes": 1, **options},
    )


def run(training):
    state, records = training.init(), []
    while state.round < training.rounds:
        state, record = training.step(state)
        records.append(record)
    return state, records


def written_out(training, every, scale=True):
    """Merges after each ``every`` steps, one client at a time, on slices of plain arrays."""
    strategy, data = training.strategy, training.data.train
    names = [(HIDDEN, 6), (HIDDEN,), (4, HIDDEN), (4,)]
    sizes = np.cumsum([int(np.prod(s)) for s in names])[:-1]
    whole = [v.reshape(s) for v, s in zip(np.split(training.init().params, sizes), names, strict=True)]
    for r in range(training.rounds):
        clients = training.draw(r, 0.0)[0]
        rows = example_order(1, training.shards, clients, r, (0, strategy.local_steps), strategy.batch_size)
        for at in range(0, strategy.local_steps, every):
            totals, held = [np.zeros_like(v) for v in whole], [np.zeros_like(v) for v in whole]
            for c, own in zip(clients, rows, strict=True):
                rate = RATES[training.levels[c]]
                keep = ceil(rate * HIDDEN)
                factor = HIDDEN / keep if scale else 1.0
                part = [np.s_[:keep, :], np.s_[:keep], np.s_[:, :keep], np.s_[:]]
                weights = [torch.tensor(v[p], requires_grad=True) for v, p in zip(whole, part, strict=True)]
                for t in range(at, at + every):
                    batch = data.batch(own[t])
                    hidden = (torch.addmm(weights[1], batch.inputs, weights[0].T) * factor).relu()
                    loss = nn.functional.cross_entropy(torch.addmm(weights[3], hidden, weights[2].T), batch.targets)
                    for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                        w.data -= strategy.client_lr * g
                size = len(training.shards.shard(c))
                for total, count, w, p in zip(totals, held, weights, part, strict=True):
                    total[p] += size * w.detach().numpy()
                    count[p] += size
            whole = [np.where(c > 0, t / np.where(c > 0, c, 1), v) for t, c, v in zip(totals, held, whole, strict=True)]
    return np.concatenate([v.reshape(-1) for v in whole])


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize(("schedule", "every"), [(Uniform(), 6), (FedSGD(), 1), (Uniform(interval=2), 2)])
def test_a_mixed_cohort_equals_the_loop_written_out(schedule, every, lanes):
    training = prepared(schedule, lanes=lanes)
    assert set(training.levels) == {0, 1, 2}
    assert_allclose(run(training)[0].params, written_out(training, every), rtol=0, atol=1e-13)


def test_another_scale_is_seen_by_that_tolerance():
    training = prepared()
    assert np.abs(run(training)[0].params - written_out(training, 6, scale=False)).max() > 1e-3


def test_everyone_at_full_width_is_federated_averaging_bit_for_bit():
    plain = FedAvg(client_lr=0.1, cohort=7, local_steps=6, batch_size=5)
    wide = HeteroFL(client_lr=0.1, cohort=7, local_steps=6, batch_size=5, widths=Widths(rates=RATES, shares=(1, 0, 0)))
    assert_array_equal(run(prepared(strategy=wide))[0].params, run(prepared(strategy=plain))[0].params)


def test_coordinates_nobody_holds_keep_their_bits():
    narrow = HeteroFL(client_lr=0.1, cohort=7, local_steps=6, batch_size=5, widths=Widths(rates=RATES, shares=(0, 1, 1)))
    training = prepared(strategy=narrow)
    after, before = run(training)[0].params, training.init().params
    held = np.zeros(len(before), bool)
    held[training.shapes[1].trained.coordinates] = True
    assert_array_equal(after[~held], before[~held])
    assert (after[held] != before[held]).all()


def test_bytes_flops_and_seconds_are_those_of_what_each_client_holds():
    training = prepared()
    _, (first, *_) = run(training)
    keep = np.array([ceil(r * HIDDEN) for r in RATES])[training.levels[first.cohort]]
    parameters = keep * (6 + 1 + 4) + 4
    assert_array_equal(first.clients["bytes_up"], 8 * parameters + 8)
    assert_array_equal(first.clients["bytes_down"], 8 * parameters)
    assert_array_equal(first.clients["flops"], 6 * 3 * 5 * 2 * keep * (6 + 4))


MIXED = Intervals.explicit([[2, 4, 6], [6], [2, 4, 6], [3, 6], [2, 4, 6], [6], [6]])


@pytest.mark.parametrize("schedule", [FedSGD(), MIXED])
def test_units_of_any_size_give_the_same_digests(schedule):
    assert len({digest(*run(prepared(schedule, lanes=2, unit_blocks=u))) for u in (None, 1, 2)}) == 1


def test_widths_by_device_give_the_strong_the_whole_model():
    training = prepared(strategy=HeteroFL(cohort=7, local_steps=2, batch_size=5, widths=Widths(rates=RATES)))
    assert training.levels[np.argmin(training.fleet.memory)] == 2
    assert len(set(training.levels)) > 1


@pytest.mark.parametrize(
    ("widths", "match"),
    [({"rates": (0.5, 1.0)}, "rates"), ({"rates": (1.0, 0.0)}, "rates"), ({"rates": (1.0, 0.5), "shares": (1.0,)}, "shares")],
)
def test_bad_widths_are_refused(widths, match):
    with pytest.raises(ValueError, match=match):
        Widths(**widths)


def test_a_model_without_a_hidden_layer_is_refused():
    @dataclass(frozen=True)
    class Linear(Clouds):
        def build(self, seed):
            return nn.Sequential(nn.Linear(6, 4, dtype=torch.float64))

    with pytest.raises(ValueError, match="has none"):
        Training.prepare(
            task=Linear(),
            fleet=Fleet.sample(4, seed=0),
            strategy=HeteroFL(),
            communication=Uniform(),
            rounds=1,
            seed=0,
            executor=SerialExecutor(),
        )
