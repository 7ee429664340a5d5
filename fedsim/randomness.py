"""Random draws as functions of ``(seed, purpose, client, index)``: no global state, so order and workers cannot matter.

Single generators come from :func:`rng_for`. Draws for many clients at once come from :func:`uniforms`, :func:`normals`
and :func:`permutations`, which evaluate the counter-based Philox4x32-10 generator (Salmon, Moraes, Dror, Shaw, SC 2011)
in one vectorised pass: a client's numbers are the same whichever clients share the call.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_FULL = np.uint64(2**64 - 1)
_SHORT = 2048


def rng_for(seed: int, *path: int | str) -> np.random.Generator:
    """A generator that is a function of ``(seed, *path)`` alone.

    >>> rng_for(0, "cohort", 3).integers(100) == rng_for(0, "cohort", 3).integers(100)
    True
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_hash(seed, path, 16), "little")))


@contextmanager
def torch_seeded(seed: int, *path: int | str) -> Iterator[None]:
    """Seed torch's CPU generator from ``(seed, *path)`` inside the block and put its old state back after it."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(_hash(seed, path, 8), "little") >> 1)
        yield


def uniforms(seed: int, purpose: str, clients: ArrayLike, index: ArrayLike, size: int, *, part: int = 0) -> NDArray[np.float64]:
    """Draws in ``[0, 1)`` (C, size) for ``clients`` (C,) at ``index`` (a round or tick; a scalar or (C,)).

    ``part`` tells apart several uses under one index (a pass over a shard, say). Client ids, indices and parts below 2**32.
    """
    return _whole(seed, purpose, clients, index, size, part).astype(np.float64) / 9007199254740992.0


def normals(seed: int, purpose: str, clients: ArrayLike, index: ArrayLike, size: int, *, part: int = 0) -> NDArray[np.float64]:
    """Standard normal draws (C, size), by the inverse distribution function of :func:`uniforms`."""
    from scipy.special import ndtri

    return np.asarray(ndtri(uniforms(seed, purpose, clients, index, size, part=part) + 2.0**-54))


def permutations(seed: int, purpose: str, clients: ArrayLike, index: ArrayLike, lengths: ArrayLike, *, part: int = 0) -> NDArray[np.int64]:
    """One permutation of ``range(lengths[c])`` for each client, (C, max length), padded with -1 at the end of a row."""
    lengths = np.atleast_1d(np.asarray(lengths, np.int64))
    widest = int(lengths.max(initial=0))
    draws = _whole(seed, purpose, clients, index, widest, part)
    outside = np.arange(widest) >= lengths[:, None]
    if widest <= _SHORT:  # a draw and its place share a word, and sorting words is several times faster than sorting places
        draws = np.sort((draws << np.uint64(11)) | np.arange(widest, dtype=np.uint64) | np.where(outside, _FULL, np.uint64(0)), axis=1)
        order = (draws & np.uint64(_SHORT - 1)).astype(np.int64)
    else:
        order = np.argsort(np.where(outside, _FULL, draws), axis=1, kind="stable")
    order[outside] = -1
    return order


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of ``counter`` (..., 4), 32-bit words held in uint64, under a key of two 32-bit words."""
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def _whole(seed: int, purpose: str, clients: ArrayLike, index: ArrayLike, size: int, part: int) -> NDArray[np.uint64]:
    """Whole numbers of 53 bits (C, size)."""
    words = _words(seed, purpose, clients, index, 2 * size, part)
    return ((words[:, 0::2] >> np.uint64(5)) << np.uint64(26)) | (words[:, 1::2] >> np.uint64(6))


def _words(seed: int, purpose: str, clients: ArrayLike, index: ArrayLike, size: int, part: int) -> NDArray[np.uint64]:
    clients = np.atleast_1d(np.asarray(clients, np.uint64))
    index = np.broadcast_to(np.asarray(index, np.uint64), clients.shape)
    blocks = -(-size // 4)
    counter = np.empty((len(clients), blocks, 4), np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 1], counter[..., 2] = clients[:, None], index[:, None]
    counter[..., 3] = part
    digest = _hash(seed, (purpose,), 8)
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    return philox4x32(counter, key).reshape(len(clients), 4 * blocks)[:, :size]


def _hash(seed: int, path: tuple[int | str, ...], size: int) -> bytes:
    text = repr((int(seed), *(p if isinstance(p, str) else int(p) for p in path)))
    return hashlib.blake2b(text.encode(), digest_size=size).digest()
