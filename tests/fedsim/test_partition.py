"""Partitions: exact, functions of the seed, and each with the shape it promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.encoding import decode, encode
from fedsim.partition import IID, ByKey, BySize, Dirichlet, LabelShards, Partition, Shards
from fedsim.tasks.base import Dataset

PARTITIONS: list[Partition] = [
    IID(),
    LabelShards(labels_per_client=2),
    Dirichlet(alpha=0.05),
    Dirichlet(alpha=0.3, by="domain", minimum=3),
    ByKey("domain"),
    ByKey("label"),
    BySize(exponent=1.5),
]


def data(counts: tuple[int, ...] = (100, 90, 60, 30), domains: int = 3) -> Dataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Dataset(np.zeros((len(labels), 1), np.float32), labels, {"domain": 7 + 5 * (np.arange(len(labels)) % domains)})


def assert_exact(shards: Shards, num_examples: int, num_clients: int) -> None:
    assert len(shards) == num_clients
    np.testing.assert_array_equal(np.sort(np.concatenate([shards.shard(c) for c in range(num_clients)])), np.arange(num_examples))
    assert shards.sizes.sum() == num_examples


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
@pytest.mark.parametrize("num_clients", [2, 5, 40])
def test_every_example_belongs_to_exactly_one_client(partition: Partition, num_clients: int) -> None:
    dataset = data()
    shards = partition.split(dataset, num_clients, seed=1)
    assert_exact(shards, len(dataset), num_clients)
    assert shards.sizes.min() >= 1


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_a_partition_is_a_function_of_its_seed(partition: Partition) -> None:
    dataset = data()
    np.random.seed(3)  # noqa: NPY002
    first, again, other = (partition.split(dataset, 20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.indices, again.indices)
    np.testing.assert_array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.indices, other.indices)


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_a_partition_survives_encoding(partition: Partition) -> None:
    assert decode(*encode(partition)) == partition


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    num_clients=st.integers(1, 30),
    alpha=st.floats(1e-3, 50.0),
    minimum=st.integers(0, 4),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_dirichlet_is_exact_and_never_below_its_minimum(counts: list[int], num_clients: int, alpha: float, minimum: int, seed: int) -> None:
    dataset = data(tuple(counts), domains=1)
    partition = Dirichlet(alpha=alpha, minimum=minimum)
    if num_clients * max(1, minimum) > len(dataset) and minimum:
        with pytest.raises(ValueError, match="examples"):
            partition.split(dataset, num_clients, seed)
        return
    shards = partition.split(dataset, num_clients, seed)
    assert_exact(shards, len(dataset), num_clients)
    assert shards.sizes.min() >= minimum


def test_dirichlet_shares_have_the_variance_of_their_law() -> None:
    """A client's share of one value is Beta(alpha, (C - 1) alpha), with variance (C - 1) / (C**2 (C alpha + 1))."""
    dataset, clients, alpha = data((4000,) * 12, domains=1), 10, 0.5
    shards = Dirichlet(alpha=alpha, minimum=0).split(dataset, clients, seed=0)
    shares = shards.histogram(dataset.keys["label"], 12) / 4000
    repeated = np.concatenate(
        [
            shares,
            *[Dirichlet(alpha=alpha, minimum=0).split(dataset, clients, s).histogram(dataset.targets, 12) / 4000 for s in range(1, 15)],
        ]
    )
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert repeated.mean() == pytest.approx(1 / clients)
    assert repeated.var() == pytest.approx(expected, rel=0.1)


def test_repairing_small_clients_leaves_the_rich_ones_mix_alone() -> None:
    dataset = data((400, 400, 400, 400), domains=1)
    free, repaired = (Dirichlet(alpha=0.1, minimum=m).split(dataset, 40, 0).histogram(dataset.targets, 4) for m in (0, 5))
    moved = np.abs(free - repaired).sum() / 2
    assert moved == np.maximum(5 - free.sum(axis=1), 0).sum()  # as many examples as were lacking, no more
    assert repaired.sum(axis=1).min() == 5


def test_a_small_alpha_concentrates_and_a_large_alpha_spreads() -> None:
    dataset = data((500, 500, 500, 500), domains=1)

    def dominance(alpha: float) -> float:
        counts = Dirichlet(alpha=alpha).split(dataset, 20, 0).histogram(dataset.targets, 4)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert dominance(0.05) > 0.85
    assert dominance(1000.0) < 0.35


def test_label_shards_give_every_client_exactly_so_many_labels() -> None:
    dataset = data((120, 80, 100, 110, 90), domains=1)
    for each in (1, 2, 3, 5):
        counts = LabelShards(labels_per_client=each).split(dataset, 25, seed=0).histogram(dataset.targets, 5)
        np.testing.assert_array_equal((counts > 0).sum(axis=1), each)


def test_label_shards_mix_labels_at_random_pairs() -> None:
    dataset = data((100,) * 10, domains=1)
    counts = LabelShards(labels_per_client=2).split(dataset, 100, seed=0).histogram(dataset.targets, 10)
    assert len({tuple(np.flatnonzero(row)) for row in counts}) > 30  # of 45 pairs


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = IID().split(data(), 37, seed=0).sizes
    assert np.ptp(sizes) <= 1


def test_one_client_a_value_holds_that_value_in_order() -> None:
    dataset = data()
    counts = ByKey("label").split(dataset, 4, seed=5).histogram(dataset.targets, 4)
    np.testing.assert_array_equal(counts, np.diag([100, 90, 60, 30]))


def test_fewer_clients_than_values_hold_whole_values_of_balanced_size() -> None:
    labels = np.repeat(np.arange(30), np.arange(1, 31))
    dataset = Dataset(np.zeros((len(labels), 1), np.float32), labels)
    counts = ByKey("label").split(dataset, 4, seed=0).histogram(labels, 30)
    np.testing.assert_array_equal((counts > 0).sum(axis=0), 1)
    assert np.ptp(counts.sum(axis=1)) <= 2


def test_more_clients_than_values_hold_part_of_one_value() -> None:
    dataset = data()
    counts = ByKey("label").split(dataset, 28, seed=0).histogram(dataset.targets, 4)
    np.testing.assert_array_equal((counts > 0).sum(axis=1), 1)
    np.testing.assert_array_equal((counts > 0).sum(axis=0), [10, 9, 6, 3])  # 28 clients by size of value


def test_given_sizes_are_the_sizes() -> None:
    sizes = (0, 200, 30, 50)
    shards = BySize(sizes=sizes).split(data(), 4, seed=0)
    np.testing.assert_array_equal(shards.sizes, sizes)
    assert_exact(shards, 280, 4)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0, 500.0])
def test_power_law_sizes_follow_the_law_and_reach_everyone(exponent: float) -> None:
    dataset = data((5000, 5000), domains=1)
    sizes = np.sort(BySize(exponent=exponent).split(dataset, 50, seed=0).sizes)[::-1]
    law = np.arange(1, 51) ** -exponent
    assert sizes.sum() == 10_000
    assert sizes.min() >= 1
    if exponent <= 1.0:
        np.testing.assert_allclose(sizes, law / law.sum() * 10_000, atol=1.0)


def test_histogram_equals_counting_one_by_one() -> None:
    dataset = data()
    shards = Dirichlet(alpha=0.3).split(dataset, 12, seed=2)
    brute = np.array([[int((dataset.targets[shards.shard(c)] == v).sum()) for v in range(4)] for c in range(12)])
    np.testing.assert_array_equal(shards.histogram(dataset.targets, 4), brute)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        shards.histogram(dataset.targets, 3)


@pytest.mark.parametrize("partition", [p for p in PARTITIONS if not isinstance(p, LabelShards)], ids=repr)
def test_more_clients_than_examples_are_refused(partition: Partition) -> None:
    with pytest.raises(ValueError, match=r"281 clients.* 280"):
        partition.split(data(), 281, seed=0)


def test_unknown_keys_are_refused_with_the_keys_there_are() -> None:
    for partition in (ByKey("speaker"), Dirichlet(by="speaker")):
        with pytest.raises(ValueError, match=r"no key 'speaker'.*domain, label"):
            partition.split(data(), 3, seed=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dirichlet(alpha=0.0), "alpha must be positive"),
        (lambda: Dirichlet(alpha=float("nan")), "alpha must be positive"),
        (lambda: Dirichlet(minimum=-1), "minimum must be at least 0"),
        (lambda: LabelShards(0), "labels_per_client must be at least 1"),
        (lambda: BySize(), "either sizes or exponent"),
        (lambda: BySize(sizes=(1,), exponent=1.0), "either sizes or exponent"),
        (lambda: BySize(sizes=(3, -1)), "must not be negative"),
        (lambda: BySize(exponent=-1.0), "exponent must be finite"),
        (lambda: BySize(sizes=(100, 100)).split(data(), 2, 0), "sum to 280"),
        (lambda: LabelShards(5).split(data(), 10, 0), "4 labels"),
        (lambda: LabelShards(1).split(data(), 3, 0), "4 labels"),
        (lambda: IID().split(data(), 0, 0), "at least 1"),
        (lambda: IID().split(data((0,)), 1, 0), "no examples"),
    ],
)
def test_bad_partitions_are_refused_with_a_reason(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_examples_by_place_are_those_of_the_shards(partition: Partition) -> None:
    shards = partition.split(data(), 7, seed=4)
    clients = np.array([6, 0, 3])
    places = np.arange(12).reshape(3, 4) % shards.sizes[clients, None]
    expected = np.stack([shards.shard(int(c))[row] for c, row in zip(clients, places, strict=True)])
    np.testing.assert_array_equal(shards.examples(clients, places), expected)
    np.testing.assert_array_equal(shards.histogram(data().targets, 4, clients), shards.histogram(data().targets, 4)[clients])
    np.testing.assert_array_equal(shards.totals(data().targets, 4), shards.histogram(data().targets, 4).sum(0))
    for wrong in (-1, int(shards.sizes[6])):
        with pytest.raises(IndexError, match=f"place {wrong} is not in a shard"):
            shards.examples(np.array([6]), np.array([[wrong]]))
