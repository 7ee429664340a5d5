"""The event loop against hand values, plain loops and itself: where and how work runs must not move a bit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from fedsim.communication import DynamicFL, FedSGD, Intervals, RandomGroup, Uniform
from fedsim.encoding import decode, digest, encode
from fedsim.errors import ClientError, DivergedError
from fedsim.fleet import Fleet
from fedsim.partition import LabelShards, Shards
from fedsim.randomness import permutations
from fedsim.rounds import Training
from fedsim.runtime import SerialExecutor
from fedsim.strategies import FedAvg
from fedsim.tasks.base import Dataset, Splits, Task

# ---------------------------------------------------------------- fleets and tasks whose answers are known


@dataclass(frozen=True)
class Consecutive:
    """Shards of given sizes, in the data set's order."""

    sizes: tuple[int, ...]
    key: str | None = None

    def split(self, dataset: Dataset, num_clients: int, seed: int) -> Shards:
        return Shards(np.arange(len(dataset)), np.concatenate([[0], np.cumsum(self.sizes)]))


def fleet_of(partition, num, **columns):
    ones = dict.fromkeys(("flops", "memory", "up", "down"), np.full(num, 1e9))
    return Fleet.from_table({**ones, **columns}, partition=partition)


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, inputs):
        return self.w.expand(len(inputs))


@dataclass(frozen=True)
class Quadratics(Task):
    """Client i's loss is curvature / 2 (w - optimum)^2 whatever its batch."""

    curvatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    optima: tuple[float, ...] = (0.0, 1.0, 3.0)
    sizes: tuple[int, ...] = (5, 3, 2)
    num_classes: int = 1

    def load(self):
        rows = np.repeat(np.stack([self.curvatures, self.optima], axis=1), self.sizes, axis=0)
        data = Dataset(rows, np.zeros(len(rows), np.int64))
        return Splits(data, data)

    def build(self, seed):
        return Scalar()

    def losses(self, model, batch):
        return batch.inputs[:, 0] / 2 * (model(batch.inputs) - batch.inputs[:, 1]) ** 2

    def correct(self, model, batch):
        return torch.zeros(len(batch.inputs))


@dataclass(frozen=True)
class Blobs(Task):
    """Ten labels with Gaussian features; a linear model or a perceptron, in single or double precision."""

    hidden: int = 0
    dtype: str = "float64"
    num: int = 240
    num_classes: int = 10
    written_out: bool = True
    noise: float = 0.5

    def load(self):
        rng = np.random.default_rng(0)
        labels = np.arange(self.num) % 10
        inputs = rng.normal(size=(10, 12))[labels] + self.noise * rng.normal(size=(self.num, 12))
        data = Dataset(inputs.astype(self.dtype), labels)
        return Splits(data, data)

    def build(self, seed):
        generator = torch.Generator().manual_seed(seed)
        sizes = (12, self.hidden, 10) if self.hidden else (12, 10)
        layers = []
        for before, after in pairwise(sizes):
            linear = nn.Linear(before, after, dtype=getattr(torch, self.dtype))
            with torch.no_grad():
                for p in linear.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / before**0.5)
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class MappedBlobs(Blobs):
    """Blobs with a loss of its own, which only the mapped program can batch."""

    def losses(self, model, batch):
        return nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="none")


def training(task, fleet, communication, *, strategy=None, rounds=3, seed=1, lanes=1, executor=None, **options):
    return Training.prepare(
        task=task,
        fleet=fleet,
        strategy=strategy or FedAvg(client_lr=0.1, cohort=8, local_steps=12, batch_size=5),
        communication=communication,
        rounds=rounds,
        seed=seed,
        executor=executor or SerialExecutor(),
        lanes=lanes,
        **options,
    )


def run(prepared):
    state, records = prepared.init(), []
    while state.round < prepared.rounds:
        state, record = prepared.step(state)
        records.append(record)
    return state, records


def quadratic_round(points, *, start=0.0, rounds=1, task=None):
    task = task or Quadratics()
    steps = max(p[-1] for p in points)
    prepared = training(
        task,
        fleet_of(Consecutive(task.sizes), len(task.sizes)),
        Intervals.explicit(points),
        strategy=FedAvg(client_lr=0.1, cohort=len(task.sizes), local_steps=steps, batch_size=1),
        rounds=rounds,
    )
    state = replace(prepared.init(), params=np.array([start]))
    while state.round < rounds:
        state, _ = prepared.step(state)
    return float(state.params[0])


EVERY, ONCE = [1, 2, 3, 4, 5], [5]

# ---------------------------------------------------------------- hand values on quadratics


@pytest.mark.parametrize(
    ("points", "one_round", "fixed"),
    [
        ([EVERY, ONCE, EVERY], 1.0313564181591004, 1.5840327377198737),
        ([EVERY] * 3, 1.028402463, 1.5789473684210527),
        ([ONCE] * 3, 0.75504, 1.2777818205818592),
        ([[2, 4, 5]] * 3, 0.96512988, None),
    ],
)
def test_schedules_give_the_values_computed_by_hand(points, one_round, fixed):
    assert quadratic_round(points) == pytest.approx(one_round, rel=1e-8)
    if fixed is not None:
        assert quadratic_round(points, rounds=30) == pytest.approx(fixed, rel=1e-9)


def test_the_mixed_schedule_is_exact_to_the_last_digits():
    assert quadratic_round([EVERY, ONCE, EVERY]) == pytest.approx(1.0313564181591004, rel=1e-15)


def test_a_group_of_one_changes_nothing():
    assert quadratic_round([ONCE, ONCE, EVERY]) == quadratic_round([ONCE, ONCE, ONCE])


def test_splitting_a_client_changes_a_round_by_rounding_only():
    whole = Quadratics(sizes=(4, 3, 2))
    halves = Quadratics(curvatures=(1.0, 1.0, 2.0, 4.0), optima=(0.0, 0.0, 1.0, 3.0), sizes=(2, 2, 3, 2))
    points = [EVERY, ONCE, EVERY]
    assert quadratic_round(points, task=whole) == pytest.approx(quadratic_round([points[0], *points], task=halves), rel=1e-14)


def event_loop(points, curvatures, optima, sizes, rate=0.1):
    """The round as the paper's algorithm says, one client and one step at a time."""
    weights, w = np.array(sizes, float), 0.0
    x, at = [w] * len(points), [0] * len(points)
    for point in sorted(set().union(*points)):
        due = [i for i, own in enumerate(points) if point in own]
        for i in due:
            for _ in range(point - at[i]):
                x[i] -= rate * curvatures[i] * (x[i] - optima[i])
            at[i] = point
        w = sum(weights[i] * x[i] for i in due) / sum(weights[i] for i in due)
        for i in due:
            x[i] = w
    return w


@given(st.lists(st.sets(st.integers(1, 7), max_size=6), min_size=1, max_size=6), st.sampled_from([None, 1, 2, 8]))
@settings(max_examples=25, deadline=None)
def test_any_schedule_follows_the_algorithm_step_by_step(chosen, unit_blocks):
    points = [[*sorted(own), 8] for own in chosen]
    n = len(points)
    task = Quadratics(
        curvatures=tuple(1.0 + i for i in range(n)), optima=tuple(float(i * i % 5) for i in range(n)), sizes=tuple(range(1, n + 1))
    )
    strategy = FedAvg(client_lr=0.1, cohort=n, local_steps=8, batch_size=1)
    prepared = training(
        task, fleet_of(Consecutive(task.sizes), n), Intervals.explicit(points), strategy=strategy, rounds=1, unit_blocks=unit_blocks
    )
    state, _ = run(prepared)
    assert float(state.params[0]) == pytest.approx(event_loop(points, task.curvatures, task.optima, task.sizes), rel=1e-12, abs=1e-14)


# ---------------------------------------------------------------- the ends of the schedule, as plain loops


def pairwise_sum(vectors: Sequence[np.ndarray]) -> np.ndarray:
    while len(vectors) > 1:
        vectors = [sum(vectors[i + 1 : i + 2], vectors[i]) for i in range(0, len(vectors), 2)]
    return vectors[0]


def example_stream(seed, client, round, shard):
    for number in count():
        yield from shard[permutations(seed, "batches", [client], round, [len(shard)], part=number)[0]]


def plain_loop(prepared, every, *, batch_rounds=None, rounds=None):
    """Federated averaging with a merge after each ``every`` steps: one client at a time, torch's own optimiser, no fedsim engine."""
    task, strategy = prepared.task, prepared.strategy
    data, params = task.data().train, prepared.init().params
    model = task.build(prepared.seed)
    for r in range(prepared.rounds):
        clients, _ = prepared.draw(r, 0.0)
        shards = {c: prepared.shards.shard(c) for c in clients}
        total = sum(len(s) for s in shards.values())
        streams = {c: example_stream(prepared.seed, c, r, shards[c]) for c in clients}
        for _ in range(0, strategy.local_steps, every):
            uploads = []
            for c in clients:
                prepared.layout.load(model, params)
                optimiser = torch.optim.SGD(model.parameters(), lr=strategy.client_lr)
                for _ in range(every):
                    batch = data.batch(np.array(list(islice(streams[c], strategy.batch_size))))
                    optimiser.zero_grad()
                    task.losses(model, batch).mean().backward()
                    optimiser.step()
                uploads.append(np.asarray(len(shards[c]) / total, params.dtype) * prepared.layout.flatten(model))
            params = pairwise_sum(uploads)
    return params


LABELS = LabelShards(labels_per_client=1)


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize(("schedule", "every"), [(FedSGD(), 1), (Uniform(), 12), (Uniform(interval=4), 4)])
def test_uniform_schedules_equal_a_plain_loop_bit_for_bit_in_double(hidden, schedule, every):
    prepared = training(Blobs(hidden), fleet_of(LABELS, 20), schedule, rounds=2)
    state, _ = run(prepared)
    assert_array_equal(state.params, plain_loop(prepared, every))


@pytest.mark.parametrize(("high", "low", "every"), [(1, 1, 1), (12, 12, 12)])
def test_dynamic_fl_with_equal_intervals_is_fedsgd_and_fedavg_bit_for_bit(high, low, every):
    prepared = training(Blobs(16), fleet_of(LABELS, 20), DynamicFL(high=high, low=low, budget=0.5), rounds=2)
    state, records = run(prepared)
    assert_array_equal(state.params, plain_loop(prepared, every))
    assert {len(r.group) for r in records} <= {2, 3, 4}


@pytest.mark.parametrize("task", [Blobs(16, "float32"), MappedBlobs(16, "float32")])
@pytest.mark.parametrize(("schedule", "every"), [(FedSGD(), 1), (Uniform(), 12)])
def test_lanes_equal_a_plain_loop_to_a_millionth_in_single(task, schedule, every):
    prepared = training(task, fleet_of(LABELS, 20), schedule, lanes=8)
    state, _ = run(prepared)
    assert_allclose(state.params, plain_loop(prepared, every), rtol=0, atol=1e-6)


def test_an_interval_inside_a_round_equals_short_rounds_on_the_same_batches():
    long = training(Blobs(16), fleet_of(LABELS, 20), Uniform(interval=4), rounds=1)
    state, records = run(long)
    assert records[0].uploads == 8 * 3
    assert_array_equal(state.params, plain_loop(long, 4))


def test_momentum_with_a_merge_every_step_is_centralised_momentum():
    task = Blobs(16, num=80)
    strategy = FedAvg(client_lr=0.1, cohort=8, local_steps=12, batch_size=5, momentum=0.9, weight_decay=1e-3, weighting="uniform")
    prepared = training(task, fleet_of(LABELS, 10), FedSGD(), strategy=replace(strategy, cohort=10), rounds=1)
    state, _ = run(prepared)
    model, data = task.build(1), task.data().train
    prepared.layout.load(model, prepared.init().params)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    streams = [example_stream(1, c, 0, prepared.shards.shard(c)) for c in range(10)]
    for _ in range(12):
        optimiser.zero_grad()
        sum(task.losses(model, data.batch(np.array(list(islice(s, 5))))).mean() / 10 for s in streams).backward()
        optimiser.step()
    assert_allclose(state.params, prepared.layout.flatten(model), rtol=0, atol=1e-12)


def test_clip_bounds_the_step_of_every_client():
    strategy = FedAvg(client_lr=1.0, cohort=1, local_steps=1, batch_size=5, clip=1e-3)
    for task, lanes in ((Blobs(16), 1), (Blobs(16), 4)):
        prepared = training(task, fleet_of(LABELS, 20), Uniform(), strategy=strategy, rounds=1, lanes=lanes)
        state, _ = run(prepared)
        assert np.linalg.norm(state.params - prepared.init().params) == pytest.approx(1e-3, rel=1e-2)


# ---------------------------------------------------------------- lanes, units, chains: only speed


@pytest.mark.parametrize("task", [Blobs(16, "float32"), MappedBlobs(16, "float32")])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"clip": 0.5}, {"weight_decay": 0.01}])
def test_lanes_and_the_loop_agree(task, options):
    strategy = FedAvg(client_lr=0.1, cohort=6, local_steps=12, batch_size=5, **options)
    schedule = DynamicFL(high=2, budget=0.5)
    results = [run(training(task, fleet_of(LABELS, 20), schedule, strategy=strategy, lanes=n)) for n in (1, 4, 8)]
    for state, records in results[1:]:
        assert_allclose(state.params, results[0][0].params, rtol=0, atol=1e-5)
        assert_allclose(records[-1].clients["train_loss"], results[0][1][-1].clients["train_loss"], atol=1e-5)


def test_other_batches_are_seen_by_that_tolerance():
    a, b = (run(training(Blobs(16, "float32"), fleet_of(LABELS, 20), Uniform(), seed=s, rounds=1))[0].params for s in (1, 2))
    assert np.abs(a - b).max() > 1e-3


def test_perceptrons_take_the_written_out_pass_and_other_losses_the_mapped_one():
    from fedsim.dense import is_dense

    data = Blobs().data().train
    assert is_dense(Blobs(16), Blobs(16).build(0), data)
    assert not is_dense(MappedBlobs(16), MappedBlobs(16).build(0), data)
    assert not is_dense(Dropping(16), Dropping(16).build(0), data)


MIXED = Intervals.explicit([[3, 6, 9, 12], [12], [3, 6, 9, 12], [6, 12], [4, 8, 12], [12], [3, 6, 9, 12]])


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("schedule", [FedSGD(), MIXED, DynamicFL(high=2, low=6, budget=0.5)])
def test_units_of_any_size_and_chains_give_the_same_digests(lanes, schedule):
    strategy = FedAvg(client_lr=0.1, cohort=7, local_steps=12, batch_size=5, momentum=0.9)
    seen = set()
    for unit_blocks in (None, 1, 2, 4):
        prepared = training(
            Blobs(16, "float32"), fleet_of(LABELS, 20), schedule, strategy=strategy, rounds=1, lanes=lanes, unit_blocks=unit_blocks
        )
        state, records = run(prepared)
        seen.add(digest(state, *records))
    assert len(seen) == 1


def test_a_fold_in_another_order_changes_the_digest(monkeypatch):
    import fedsim.local_training
    from fedsim.updates import tree_sum

    def final():
        return digest(run(training(Blobs(16, "float32"), fleet_of(LABELS, 20), Uniform()))[0])

    before = final()
    monkeypatch.setattr(fedsim.local_training, "tree_sum", lambda parts: tree_sum(parts[1:] + parts[:1]))
    assert final() != before


def test_threads_of_the_calling_process_change_nothing():
    before = torch.get_num_threads()
    seen = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seen.add(digest(run(training(Blobs(16, "float32"), fleet_of(LABELS, 20), Uniform(), rounds=1))[0]))
    torch.set_num_threads(before)
    assert len(seen) == 1


# ---------------------------------------------------------------- the record


def test_a_round_is_recorded_in_full():
    fleet = fleet_of(LABELS, 20, flops=np.linspace(1e6, 2e6, 20), up=np.full(20, 1e4), down=np.full(20, 2e4))
    prepared = training(Blobs(16, "float32"), fleet, DynamicFL(high=1, budget=0.5), rounds=2, evaluate_every=2)
    _, (first, second) = run(prepared)
    size = prepared.layout.bytes
    assert first.uploads == len(first.group) * 12 + (8 - len(first.group))
    assert first.bytes_down == first.uploads * size
    assert first.bytes_up == first.uploads * (size + 8) + 20 * (4 * 10 + 8)
    assert second.bytes_up == second.uploads * (size + 8) == second.clients["bytes_up"].sum()
    assert first.cost_ratio == first.uploads / (8 * 12)
    assert first.flops == 8 * 12 * 3 * 5 * 2 * (12 * 16 + 16 * 10)
    assert np.isnan(first.test_accuracy)
    assert 0 < second.test_accuracy <= 1
    assert second.clock == pytest.approx(first.seconds + second.seconds)
    assert set(first.group) <= set(first.cohort)
    assert "label histograms" in first.note
    assert all(len(column) == 8 for column in first.clients.values())
    assert (first.clients["seconds"] <= first.seconds + 1e-9).all()


def test_the_round_lasts_as_long_as_its_slowest_client():
    flops = np.full(20, 1e6)
    flops[3] = 1e4
    prepared = training(
        Blobs(), fleet_of(LABELS, 20, flops=flops), Uniform(), strategy=FedAvg(cohort=20, local_steps=4, batch_size=5), rounds=1
    )
    _, (record,) = run(prepared)
    transfer = (prepared.layout.bytes * 2 + 8) / 1e9
    assert record.seconds == pytest.approx(4 * 3 * 5 * 2 * 12 * 10 / 1e4 + transfer)


def test_those_who_sit_out_send_nothing_and_have_no_loss():
    _, (record,) = run(training(Blobs(), fleet_of(LABELS, 20), DynamicFL(high=2, budget=0.5, skip=True), rounds=1))
    outside = ~np.isin(record.cohort, record.group)
    assert outside.any()
    assert (
        record.clients["uploads"][outside].sum()
        == record.clients["bytes_down"][outside].sum()
        == record.clients["flops"][outside].sum()
        == 0
    )
    assert np.isnan(record.clients["train_loss"][outside]).all()
    assert np.isfinite(record.train_loss)


def test_without_a_share_at_the_end_only_the_group_is_merged():
    silent = run(training(Blobs(), fleet_of(LABELS, 20), RandomGroup(size=3, high=2, discount=0.0), rounds=2))[0]
    skipped = run(training(Blobs(), fleet_of(LABELS, 20), RandomGroup(size=3, high=2, skip=True), rounds=2))[0]
    assert_allclose(silent.params, skipped.params, rtol=1e-13)


def test_training_learns_and_reads_the_test_split():
    _, records = run(training(Blobs(16, "float32", noise=0.2), fleet_of(LABELS, 20), FedSGD(), rounds=8, lanes=8))
    assert records[-1].test_accuracy > 0.9
    assert records[-1].test_loss < records[0].test_loss


def test_the_cohort_is_a_function_of_seed_and_round_and_ascends():
    prepared = training(Blobs(), fleet_of(LABELS, 20), Uniform())
    again = training(MappedBlobs(16), fleet_of(LABELS, 20), FedSGD())
    for r in range(5):
        drawn, _ = prepared.draw(r, 0.0)
        assert_array_equal(drawn, again.draw(r, 0.0)[0])
        assert (np.diff(drawn) > 0).all()
    assert len({tuple(prepared.draw(r, 0.0)[0]) for r in range(5)}) == 5


def test_every_client_is_drawn_equally_often():
    prepared = training(Blobs(), fleet_of(LABELS, 20), Uniform())
    counts = np.bincount(np.concatenate([prepared.draw(r, 0.0)[0] for r in range(1000)]), minlength=20)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(1000 * 0.4 * 0.6)


def test_availability_thins_the_cohort_and_is_said():
    fleet = fleet_of(LABELS, 20, availability=np.where(np.arange(20) < 10, 1.0, 0.2))
    prepared = training(Blobs(), fleet, Uniform(), strategy=FedAvg(cohort=20, local_steps=2, batch_size=5), rounds=1)
    counts = np.bincount(np.concatenate([prepared.draw(r, 0.0)[0] for r in range(500)]), minlength=20)
    assert (counts[:10] == 500).all()
    assert np.abs(counts[10:] - 100).max() < 50
    _, (record,) = run(prepared)
    assert f"only {len(record.cohort)} of 20" in record.note


def test_a_round_with_nobody_waits_for_somebody():
    prepared = training(Blobs(), fleet_of(LABELS, 20, availability=np.full(20, 0.01)), Uniform(), rounds=1)
    draws = [prepared.draw(r, 5.0) for r in range(30)]
    assert all(len(clients) for clients, _ in draws)
    assert any(begins > 5.0 for _, begins in draws)


def test_clients_without_data_are_never_drawn():
    task = Quadratics(sizes=(5, 0, 3))
    with pytest.warns(UserWarning, match="hold no examples"):
        prepared = training(task, fleet_of(Consecutive(task.sizes), 3), Uniform(), strategy=FedAvg(cohort=3, local_steps=2, batch_size=1))
    assert_array_equal(prepared.draw(0, 0.0)[0], [0, 2])


def test_a_state_survives_encoding_and_training_goes_on_from_it():
    prepared = training(Blobs(16, "float32"), fleet_of(LABELS, 20), DynamicFL(high=2, budget=0.5))
    straight, _ = run(prepared)
    state, _ = prepared.step(prepared.init())
    state = decode(*encode(state))
    while state.round < 3:
        state, _ = prepared.step(state)
    assert digest(state) == digest(straight)


# ---------------------------------------------------------------- what goes wrong


@dataclass(frozen=True)
class Spoiled(Blobs):
    """Blobs whose loss of one example is not a number, or raises."""

    row: int = 3
    how: str = "nan"

    def losses(self, model, batch):
        losses = super().losses(model, batch)
        marked = (batch.inputs[:, 0] == float(self.data().train.inputs[self.row, 0])).any()
        if self.how == "raise" and not torch._C._functorch.is_batchedtensor(marked) and bool(marked):
            raise KeyError("bad example")
        return torch.where(marked, losses * float("nan"), losses) if self.how == "nan" else losses


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_loss_that_is_not_a_number_names_client_round_and_step(lanes):
    prepared = training(
        Spoiled(), fleet_of(Consecutive((12,) * 20), 20), Uniform(), strategy=FedAvg(cohort=20, local_steps=3, batch_size=12), lanes=lanes
    )
    with pytest.raises(DivergedError) as caught:
        prepared.step(prepared.init())
    assert (caught.value.client, caught.value.round, caught.value.step) == (0, 0, 1)


def test_an_exception_in_a_loss_names_the_client_and_keeps_its_cause():
    prepared = training(
        Spoiled(row=30, how="raise"),
        fleet_of(Consecutive((12,) * 20), 20),
        Uniform(),
        strategy=FedAvg(cohort=20, local_steps=3, batch_size=12),
    )
    with pytest.raises(ClientError, match="bad example") as caught:
        prepared.step(prepared.init())
    assert caught.value.client == 2
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_overflowing_model_is_a_divergence():
    strategy = FedAvg(client_lr=1e300, cohort=2, local_steps=1, batch_size=5)
    prepared = training(Blobs(16), fleet_of(LABELS, 20), Uniform(), strategy=replace(strategy, local_steps=3))
    with pytest.raises(DivergedError):
        run(prepared)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 10, dtype=torch.float64)

    def forward(self, inputs):
        return self.linear(inputs) if inputs.sum() > 0 else self.linear(-inputs)


@dataclass(frozen=True)
class Branches(Blobs):
    """A model whose control flow reads its data."""

    def build(self, seed):
        return Branching()


def test_a_model_that_cannot_be_batched_trains_one_client_at_a_time_or_is_refused():
    loop = training(Branches(), fleet_of(LABELS, 20), Uniform(), lanes=None)
    assert loop.lanes == 1
    notes = [record.note for record in run(loop)[1]]
    assert "one at a time" in notes[0]
    assert "one at a time" not in notes[1]
    with pytest.raises(ValueError, match="lanes=1"):
        training(Branches(), fleet_of(LABELS, 20), Uniform(), lanes=8)


def test_the_rule_batches_perceptrons_and_small_pictures_only():
    from fedsim.lanes import lanes_for
    from fedsim.tasks.base import Batch

    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    convolution(torch.zeros(1, 1, 8, 8))
    dropout = nn.Sequential(nn.Linear(12, 10), nn.Dropout())
    targets = torch.zeros(2, dtype=torch.int64)
    assert lanes_for(Blobs(), Blobs(16).build(0), Batch(torch.zeros(2, 12, dtype=torch.float64), targets)) == 64
    assert lanes_for(Blobs(), Blobs(9000).build(0), Batch(torch.zeros(2, 12, dtype=torch.float64), targets)) == 8
    assert lanes_for(Blobs(), convolution, Batch(torch.zeros(2, 1, 8, 8), targets)) == 32
    assert lanes_for(Blobs(), dropout, Batch(torch.zeros(2, 12), targets)) == 1
    big = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.LazyLinear(10))
    big(torch.zeros(1, 3, 32, 32))
    assert lanes_for(Blobs(), big, Batch(torch.zeros(2, 3, 32, 32), targets)) == 1


@dataclass(frozen=True)
class Dropping(Blobs):
    def build(self, seed):
        return nn.Sequential(super().build(seed), nn.Dropout(0.5))


def test_dropout_draws_by_client_round_and_step_whatever_the_units():
    seen = {digest(run(training(Dropping(16), fleet_of(LABELS, 20), Uniform(interval=4), unit_blocks=u))[0]) for u in (1, 2, 4)}
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lanes": 3}, "power of two"),
        ({"unit_blocks": 3}, "power of two"),
        ({"rounds": 0}, "rounds"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"communication": DynamicFL(high=13)}, "high"),
        ({"communication": DynamicFL(budget=0.2)}, "fewer than two"),
    ],
)
def test_bad_settings_are_refused_before_any_work(change, match):
    options = {"communication": Uniform(), **change}
    with pytest.raises(ValueError, match=match):
        training(Blobs(), fleet_of(LABELS, 20), options.pop("communication"), **options)


@pytest.mark.parametrize(
    "field",
    [
        {"client_lr": 0.0},
        {"cohort": 0},
        {"local_steps": 0},
        {"batch_size": 0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"clip": 0.0},
        {"weighting": "x"},
    ],
)
def test_bad_hyperparameters_are_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        FedAvg(**field)


class OneRhythm(FedAvg):
    mixed = False


def test_a_strategy_that_needs_one_schedule_refuses_a_mixed_one():
    strategy = OneRhythm(client_lr=0.1, cohort=8, local_steps=12, batch_size=5)
    training(Blobs(), fleet_of(LABELS, 20), FedSGD(), strategy=strategy)
    with pytest.raises(ValueError, match="OneRhythm"):
        training(Blobs(), fleet_of(LABELS, 20), DynamicFL(budget=0.5), strategy=strategy)
