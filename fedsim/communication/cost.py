"""What crosses the wire, in bytes. A client that uploads u times sends u payloads and receives u: one at the round's start and one
after each upload but the last, whose result travels with the next round's start."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Bytes of one transfer by what they carry: parameters, float buffers, control variates, and scalars such as a sample count."""

    parameters: int
    buffers: int = 0
    control: int = 0
    scalars: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.control + self.scalars


@dataclass(frozen=True, eq=False)
class Traffic:
    """Uploads and bytes of a round by client, (n,) int64 each."""

    uploads: NDArray[np.int64]
    bytes_up: NDArray[np.int64]
    bytes_down: NDArray[np.int64]


def traffic(points: Sequence[Sequence[int]], up: ArrayLike, down: ArrayLike) -> Traffic:
    """Traffic of a round in which client i uploads after the local steps ``points[i]``; a client without points costs nothing.

    ``up`` and ``down`` are bytes of one upload and one download, of all clients or of each (n,).
    """
    uploads = np.array([len(p) for p in points], np.int64)
    return Traffic(uploads, uploads * np.asarray(up, np.int64), uploads * np.asarray(down, np.int64))


def summary_bytes(num_labels: int) -> int:
    """Bytes of one client's label histogram: a uint32 a label and its sample count. Sent once, by every client of the fleet."""
    return 4 * num_labels + 8
