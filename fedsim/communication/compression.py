"""Uploads in fewer bytes: the largest values, few bits, signs, and the feedback of what they lose.

A compression is applied to the rows of what clients upload, as differences from the model handed out. ``compress`` gives what the server
receives; ``encode`` and ``decode`` are the packed form it travels in, of exactly ``wire_bytes``. Rows that are not finite pass unchanged, so that a diverged
client is seen for what it is.
"""

# n clients, M scalars of an upload, S scalars a client keeps, k values kept by top-k

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.randomness import rng_for


@dataclass(frozen=True, eq=False)
class Senders:
    """Who compresses: ``clients`` (n,) at local ``step`` of their rounds ``draws`` (n,). Their random draws are functions of these and ``seed``."""

    clients: NDArray[np.int64]
    seed: int
    draws: NDArray[np.int64]
    step: int

    def uniforms(self, size: int, like: Tensor) -> Tensor:
        """Draws in [0, 1), (n, size), single precision, on the device of ``like``."""
        drawn = zip(self.clients.tolist(), self.draws.tolist(), strict=True)
        rows = [rng_for(self.seed, "compression", c, number, self.step).random(size, np.float32) for c, number in drawn]
        return torch.from_numpy(np.stack(rows)).to(like.device)


class Compression(Protocol):
    """Rows of values in fewer bytes; a frozen dataclass."""

    def state_size(self, size: int) -> int:
        """Scalars S a client keeps from one upload of ``size`` scalars to its next."""
        ...

    def wire_bytes(self, size: int, itemsize: int) -> int:
        """Bytes of one client's upload of ``size`` scalars that take ``itemsize`` bytes each."""
        ...

    def compress(self, values: Tensor, memory: Tensor, senders: Senders) -> tuple[Tensor, Tensor]:
        """What arrives of ``values`` (n, M), and what each client keeps, (n, S), from what it kept before."""
        ...

    def encode(self, values: Tensor, senders: Senders) -> bytes:
        """One client's ``values`` (1, M) as they travel; without memory."""
        ...

    def decode(self, data: bytes, size: int, dtype: torch.dtype) -> Tensor:
        """What arrives of an upload of ``size`` scalars, (1, size)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """``bits`` a scalar, a sign among them, in steps of the row's largest magnitude (QSGD; Alistarh, Grubic, Li, Tomioka, Vojnovic, 2017, arXiv:1610.02132).

    With ``stochastic`` a value is rounded up with the probability that makes its mean exact, else to the nearest step.
    """

    bits: int = 8
    stochastic: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits must lie in 2..16, got {self.bits}")

    def state_size(self, size: int) -> int:
        return 0

    def wire_bytes(self, size: int, itemsize: int) -> int:
        return -(-size * self.bits // 8) + itemsize

    def compress(self, values: Tensor, memory: Tensor, senders: Senders) -> tuple[Tensor, Tensor]:
        return _finite_or(values, self._values(*self._codes(values, senders))), memory

    def encode(self, values: Tensor, senders: Senders) -> bytes:
        codes, scale = self._codes(values, senders)
        unsigned = (codes[0].to(torch.int64) + self._steps).numpy()
        return _raw(scale) + _packed(unsigned, self.bits)

    def decode(self, data: bytes, size: int, dtype: torch.dtype) -> Tensor:
        itemsize = dtype.itemsize
        codes = torch.from_numpy(_unpacked(data[itemsize:], self.bits, size) - self._steps)
        return self._values(codes[None].to(dtype), _from_raw(data[:itemsize], dtype)[None])

    @property
    def _steps(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def _codes(self, values: Tensor, senders: Senders) -> tuple[Tensor, Tensor]:
        """Whole numbers of steps (n, M), and each row's largest magnitude (n, 1)."""
        scale = values.abs().amax(1, keepdim=True)
        steps = values * (self._steps / torch.where(scale > 0, scale, 1.0))
        draws = senders.uniforms(values.shape[1], values) if self.stochastic else 0.5
        return (steps + draws).floor().clamp(-self._steps, self._steps), scale

    def _values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes * (scale / self._steps)


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One bit a scalar, and the row's mean magnitude (Bernstein, Wang, Azizzadenesheli, Anandkumar, 2018, arXiv:1802.04434): biased, so use it with :class:`ErrorFeedback`."""

    def state_size(self, size: int) -> int:
        return 0

    def wire_bytes(self, size: int, itemsize: int) -> int:
        return -(-size // 8) + itemsize

    def compress(self, values: Tensor, memory: Tensor, senders: Senders) -> tuple[Tensor, Tensor]:
        return _finite_or(values, torch.where(values >= 0, self._scale(values), -self._scale(values))), memory

    def encode(self, values: Tensor, senders: Senders) -> bytes:
        return _raw(self._scale(values)) + np.packbits((values[0] >= 0).numpy()).tobytes()

    def decode(self, data: bytes, size: int, dtype: torch.dtype) -> Tensor:
        scale = _from_raw(data[: dtype.itemsize], dtype)
        positive = torch.from_numpy(np.unpackbits(np.frombuffer(data[dtype.itemsize :], np.uint8), count=size).astype(bool))
        return torch.where(positive, scale, -scale)[None]

    def _scale(self, values: Tensor) -> Tensor:
        return values.abs().mean(1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The ``share`` of a row that is largest in magnitude, at least one value; the rest arrives as 0 (Stich, Cordonnier, Jaggi, 2018, arXiv:1809.07599).

    Of equal magnitudes the first are kept. ``values`` compresses what is kept once more. Where they stand travels as a bitmap or as packed indices,
    whichever is shorter.
    """

    share: float = 0.01
    values: Quantised | Sign | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")

    def count(self, size: int) -> int:
        """How many of ``size`` values are kept."""
        return min(size, max(1, math.ceil(self.share * size - 1e-9)))

    def state_size(self, size: int) -> int:
        return 0

    def wire_bytes(self, size: int, itemsize: int) -> int:
        kept = self.count(size)
        return self._index_bytes(size) + (kept * itemsize if self.values is None else self.values.wire_bytes(kept, itemsize))

    def compress(self, values: Tensor, memory: Tensor, senders: Senders) -> tuple[Tensor, Tensor]:
        places = self._places(values)
        kept = values.gather(1, places)
        if self.values is not None:
            kept, _ = self.values.compress(kept, memory, senders)
        return _finite_or(values, torch.zeros_like(values).scatter_(1, places, kept)), memory

    def encode(self, values: Tensor, senders: Senders) -> bytes:
        size = values.shape[1]
        places = self._places(values)
        kept = values.gather(1, places)
        where = places[0].numpy()
        bitmap = np.zeros(size, np.uint8)
        bitmap[where] = 1
        index = np.packbits(bitmap).tobytes() if self._as_bitmap(size) else _packed(where, _width(size))
        return index + (_raw(kept) if self.values is None else self.values.encode(kept, senders))

    def decode(self, data: bytes, size: int, dtype: torch.dtype) -> Tensor:
        cut, kept = self._index_bytes(size), self.count(size)
        if self._as_bitmap(size):
            where = np.flatnonzero(np.unpackbits(np.frombuffer(data[:cut], np.uint8), count=size))
        else:
            where = _unpacked(data[:cut], _width(size), kept)
        found = _from_raw(data[cut:], dtype)[None] if self.values is None else self.values.decode(data[cut:], kept, dtype)
        return torch.zeros(1, size, dtype=dtype).scatter_(1, torch.from_numpy(where.astype(np.int64))[None], found)

    def _places(self, values: Tensor) -> Tensor:
        """Places (n, k), ascending."""
        size = values.shape[1]
        kept = self.count(size)
        magnitude = values.abs()
        least = magnitude.kthvalue(size - kept + 1, dim=1, keepdim=True).values
        above, equal = magnitude > least, magnitude == least
        needed = kept - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1) <= needed))
        chosen = torch.where(values.isfinite().all(1, keepdim=True), chosen, torch.arange(size, device=values.device) < kept)
        return chosen.nonzero()[:, 1].view(len(values), kept)

    def _as_bitmap(self, size: int) -> bool:
        return size <= self.count(size) * _width(size)

    def _index_bytes(self, size: int) -> int:
        return -(-min(size, self.count(size) * _width(size)) // 8)


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """``inner`` applied to what is to be sent plus what earlier uploads left out, which the client keeps (Karimireddy, Rebjock, Stich, Jaggi, 2019, arXiv:1901.09847)."""

    inner: Quantised | Sign | TopK

    def state_size(self, size: int) -> int:
        return size

    def wire_bytes(self, size: int, itemsize: int) -> int:
        return self.inner.wire_bytes(size, itemsize)

    def compress(self, values: Tensor, memory: Tensor, senders: Senders) -> tuple[Tensor, Tensor]:
        wanted = values + memory
        received, _ = self.inner.compress(wanted, memory[:, :0], senders)
        return received, wanted - received

    def encode(self, values: Tensor, senders: Senders) -> bytes:
        return self.inner.encode(values, senders)

    def decode(self, data: bytes, size: int, dtype: torch.dtype) -> Tensor:
        return self.inner.decode(data, size, dtype)


def _finite_or(values: Tensor, compressed: Tensor) -> Tensor:
    """``compressed`` rows, or ``values`` where a row is not finite."""
    return torch.where(values.isfinite().all(1, keepdim=True), compressed, values)


def _width(size: int) -> int:
    """Bits of an index below ``size``."""
    return max(1, (size - 1).bit_length())


def _packed(numbers: NDArray[np.int64], bits: int) -> bytes:
    """Numbers below ``2**bits``, one after the other."""
    digits = (numbers[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.astype(np.uint8).reshape(-1)).tobytes()


def _unpacked(data: bytes, bits: int, count: int) -> NDArray[np.int64]:
    digits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits).astype(np.int64)
    numbers: NDArray[np.int64] = digits @ (1 << np.arange(bits - 1, -1, -1))
    return numbers


def _raw(values: Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()


def _from_raw(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
