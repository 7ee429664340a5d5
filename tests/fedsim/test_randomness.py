import numpy as np
import pytest
import torch
from scipy import stats

from fedsim.randomness import normals, permutations, philox4x32, rng_for, torch_seeded, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_reproduces_the_published_vectors(counter, key, expected):
    np.testing.assert_array_equal(philox4x32(np.array(counter, np.uint64), key), np.array(expected, np.uint64))


def test_a_clients_draws_do_not_depend_on_its_company():
    together = uniforms(3, "batches", np.arange(50), 7, 33)
    for client in (0, 17, 49):
        np.testing.assert_array_equal(together[client], uniforms(3, "batches", [client], 7, 33)[0])


def test_seed_purpose_client_index_and_part_each_change_the_draws():
    base = uniforms(0, "a", [1], 2, 8)
    for other in (
        uniforms(1, "a", [1], 2, 8),
        uniforms(0, "b", [1], 2, 8),
        uniforms(0, "a", [2], 2, 8),
        uniforms(0, "a", [1], 3, 8),
        uniforms(0, "a", [1], 2, 8, part=1),
    ):
        assert not np.intersect1d(base, other).size


def test_draws_follow_their_laws():
    assert stats.kstest(uniforms(0, "u", np.arange(100), 0, 200).ravel(), "uniform").pvalue > 0.01
    assert stats.kstest(normals(0, "n", np.arange(100), 0, 200).ravel(), "norm").pvalue > 0.01


def test_permutations_are_permutations_and_uniform():
    orders = permutations(0, "p", np.arange(6000), 0, np.full(6000, 3))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 0.01
    ragged = permutations(0, "p", [1, 2], 0, [2, 4])
    assert sorted(ragged[0]) == [-1, -1, 0, 1]
    assert sorted(ragged[1]) == [0, 1, 2, 3]


def test_generators_depend_on_their_path_and_leave_global_state_alone():
    assert rng_for(0, "a", 1).random() == rng_for(0, "a", 1).random() != rng_for(0, "a", 2).random()
    before = torch.random.get_rng_state()
    with torch_seeded(0, "init"):
        first = torch.rand(3)
    assert torch.equal(before, torch.random.get_rng_state())
    with torch_seeded(0, "init"):
        assert torch.equal(first, torch.rand(3))
