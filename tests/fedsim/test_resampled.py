"""Shards that are drawn when asked for: functions of seed and client, and distributed as promised."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from fedsim.encoding import decode, encode
from fedsim.fleet import Fleet
from fedsim.resampled import Drawn, Resampled
from fedsim.tasks.base import Dataset

PARTITIONS = [
    Resampled(size=30),
    Resampled(size=20, spread=1.0),
    Resampled(size=15, spread=0.5, alpha=0.3),
    Resampled(size=40, by="domain", alpha=2.0),
]


def data(counts=(100, 90, 60, 30), domains=3):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return Dataset(np.zeros((len(labels), 1), np.float32), labels, {"domain": 7 + 5 * (np.arange(len(labels)) % domains)})


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_a_shard_is_the_same_whoever_else_is_asked_and_however_large_the_fleet(partition):
    small, large = partition.split(data(), 50, seed=1), partition.split(data(), 5000, seed=1)
    assert_array_equal(small.sizes, large.sizes[:50])
    clients = np.array([7, 49, 3])
    places = np.array([[2, 0, 2], [1, 1, 0], [0, 2, 1]]) % small.sizes[clients, None]
    alone = np.stack([small.shard(int(c))[row] for c, row in zip(clients, places, strict=True)])
    assert_array_equal(small.examples(clients, places), alone)
    assert_array_equal(large.examples(clients[::-1], places[::-1]), alone[::-1])
    whole = np.arange(int(small.sizes.min()))[None]
    assert_array_equal(small.examples(np.array([7]), whole)[0], small.shard(7)[: whole.shape[1]])


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_shards_are_functions_of_seed_and_client(partition):
    first, again, other = (partition.split(data(), 20, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first.shard(c), again.shard(c)) for c in range(20))
    assert not any(np.array_equal(first.shard(c), other.shard(c)) for c in range(20) if len(first.shard(c)) > 4)
    assert not np.array_equal(first.shard(0)[:5], first.shard(1)[:5])


@pytest.mark.parametrize("partition", PARTITIONS, ids=repr)
def test_it_survives_encoding(partition):
    assert decode(*encode(partition)) == partition
    fleet = Fleet.sample(30, partition=partition)
    assert_array_equal(decode(*encode(fleet)).shards(data()).shard(4), fleet.shards(data()).shard(4))


def test_without_alpha_all_examples_are_equally_likely_and_clients_independent():
    shards = Resampled(size=70).split(data(), 2000, seed=0)
    counts = shards.histogram(np.arange(280), 280)
    assert stats.chisquare(counts.sum(0)).pvalue > 1e-3
    assert_allclose(np.var(counts), 70 / 280 * (1 - 1 / 280), rtol=0.02)  # multinomial: draws with replacement


@pytest.mark.parametrize("alpha", [0.02, 0.3, 3.0])
def test_laws_have_the_moments_of_a_dirichlet_law_around_the_data_s_shares(alpha):
    shards = Resampled(size=5, alpha=alpha).split(data(), 20_000, seed=3)
    laws = shards.laws(np.arange(20_000))
    shares = np.array([100, 90, 60, 30]) / 280
    assert_allclose(laws.sum(1), 1.0)
    assert_allclose(laws.mean(0), shares, atol=4 * 0.5 / np.sqrt(20_000))
    assert_allclose(laws.var(0), shares * (1 - shares) / (4 * alpha + 1), rtol=0.06)
    beta = stats.beta(4 * alpha * shares[2], 4 * alpha * (1 - shares[2]))
    for share in (0.01, 0.5, 0.99):
        assert stats.binomtest(int((laws[:, 2] <= share).sum()), 20_000, beta.cdf(share)).pvalue > 1e-3


def test_shards_follow_their_own_law_and_are_uniform_inside_a_value():
    dataset = data()
    shards = Resampled(size=20_000, alpha=0.5).split(dataset, 3, seed=5)
    laws, counts = shards.laws(np.arange(3)), shards.histogram(dataset.targets, 4)
    for law, found in zip(laws, counts, strict=True):
        possible = law * 20_000 > 5
        assert stats.chisquare(found[possible], law[possible] / law[possible].sum() * found[possible].sum()).pvalue > 1e-3
    own = shards.shard(0)
    label = int(np.argmax(laws[0]))
    inside = np.bincount(own[dataset.targets[own] == label], minlength=280)[dataset.targets == label]
    assert stats.chisquare(inside).pvalue > 1e-3


def test_a_hardly_positive_alpha_gives_clients_of_one_value():
    laws = Resampled(size=5, alpha=1e-5).split(data(), 500, seed=0).laws(np.arange(500))
    assert np.isfinite(laws).all()
    assert (laws.max(axis=1) > 0.999).mean() > 0.99


def test_sizes_are_log_normal_around_their_median():
    sizes = Resampled(size=200, spread=0.5).split(data(), 20_000, seed=0).sizes
    assert_allclose(np.median(sizes), 200, rtol=0.02)
    assert_allclose(np.log(sizes).std(), 0.5, rtol=0.03)
    assert Resampled(size=1, spread=3.0).split(data(), 1000, seed=0).sizes.min() == 1


def test_counts_of_some_clients_are_those_of_all_and_add_up_to_what_is_expected():
    dataset = data()
    shards = Resampled(size=40, spread=0.7, alpha=1.0).split(dataset, 3000, seed=2)
    whole = shards.histogram(dataset.targets, 4)
    brute = np.array([np.bincount(dataset.targets[shards.shard(c)], minlength=4) for c in range(40)])
    assert_array_equal(whole[:40], brute)
    asked = np.array([5, 2999, 17])
    assert_array_equal(shards.histogram(dataset.targets, 4, asked), whole[asked])
    assert_allclose(shards.totals(dataset.targets, 4), whole.sum(0), rtol=0.05)


def test_places_outside_a_shard_are_refused():
    shards = Resampled(size=4).split(data(), 9, seed=0)
    with pytest.raises(IndexError, match="place 4 is not in a shard of 4 examples"):
        shards.examples(np.array([2]), np.array([[0, 4]]))
    with pytest.raises(IndexError, match="client 9"):
        shards.shard(9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Resampled(size=0), "size must be a whole number"),
        (lambda: Resampled(size=3, spread=-1.0), "spread must be finite"),
        (lambda: Resampled(size=3, alpha=0.0), "alpha must be None, or positive"),
        (lambda: Resampled(size=3).split(data(), 0, 0), "at least 1, got 0"),
        (lambda: Resampled(size=3).split(data((0,)), 1, 0), "no examples"),
        (lambda: Resampled(size=3, by="speaker", alpha=1.0).split(data(), 1, 0), "no key 'speaker'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_million_clients_take_the_memory_of_their_sizes():
    shards = Resampled(size=50, alpha=0.3).split(data(), 1_000_000, seed=0)
    assert isinstance(shards, Drawn)
    assert sum(a.nbytes for a in (shards.indices, shards.offsets, shards.counts)) < 9e6
    assert shards.examples(np.array([999_999]), np.array([[49]])).shape == (1, 1)
