"""What clients keep between rounds (control variates, residuals of compression), by row in files that are written once.

A round's new rows go into one segment whose name is a function of the round, so doing a round again writes the same bytes and nothing
can be applied twice. Where each client's latest row lies is a value, part of the checkpoint: files it does not name never happened.
"""

# C clients of the fleet, n of a cohort, S scalars a client keeps

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import CheckpointError
from fedsim.runs.files import write_atomically

Rows = NDArray[np.floating[Any]]
_MOST_SEGMENTS = 64
_CHUNK = 1024


@dataclass(frozen=True)
class Segment:
    """A file of ``rows`` rows; ``digest`` is that of its values."""

    number: int
    rows: int
    digest: str


@dataclass(frozen=True, eq=False)
class ClientStates:
    """The ``segment`` (C,) (a number; -1: nothing kept yet, which reads as zeros) and ``row`` (C,) that hold each client's latest state."""

    segment: NDArray[np.int32]
    row: NDArray[np.int32]
    segments: tuple[Segment, ...] = ()

    @classmethod
    def empty(cls, num_clients: int) -> "ClientStates":
        """Nobody keeps anything yet."""
        return cls(np.full(num_clients, -1, np.int32), np.zeros(num_clients, np.int32))


class ClientLog:
    """The files of one run under ``directory``: rows of ``size`` scalars of ``dtype``."""

    def __init__(self, directory: Path, size: int, dtype: str):
        self.directory, self.size, self.dtype = directory, size, np.dtype(dtype)
        self._open: dict[Segment, Rows] = {}

    def read(self, states: ClientStates, clients: NDArray[np.int64]) -> Rows:
        """States (n, S) of ``clients`` (n,). ``CheckpointError`` for a segment that is missing or damaged."""
        values = np.zeros((len(clients), self.size), self.dtype)
        numbers, rows = states.segment[clients], states.row[clients]
        for segment in states.segments:
            inside = np.flatnonzero(numbers == segment.number)
            if len(inside):
                values[inside] = self._rows(segment)[rows[inside]]
        return values

    def write(self, states: ClientStates, round: int, clients: NDArray[np.int64], values: Rows) -> ClientStates:
        """``states`` after ``clients`` (n,) kept ``values`` (n, S) in ``round``; merges segments when they are many or mostly outdated."""
        after = self._written(states, 2 * round, clients, (values,))
        alive = np.flatnonzero(after.segment >= 0)
        if len(after.segments) <= _MOST_SEGMENTS and sum(s.rows for s in after.segments) <= 2 * max(len(alive), 1):
            return after
        chunks = (self.read(after, alive[i : i + _CHUNK]) for i in range(0, len(alive), _CHUNK))
        return self._written(after, 2 * round + 1, alive, chunks)

    def _written(self, states: ClientStates, number: int, clients: NDArray[np.int64], chunks: Iterable[Rows]) -> ClientStates:
        digest = hashlib.blake2b(digest_size=16)

        def fill(file: Any) -> None:
            header = {"descr": self.dtype.str, "fortran_order": False, "shape": (len(clients), self.size)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                data = np.ascontiguousarray(chunk, self.dtype).tobytes()
                digest.update(data)
                file.write(data)

        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(number), fill)
        new = Segment(number, len(clients), digest.hexdigest())
        self._open = {s: rows for s, rows in self._open.items() if s in states.segments and s.number != number}
        self._open[new] = self._mapped(number)
        segment, row = states.segment.copy(), states.row.copy()
        segment[clients], row[clients] = number, np.arange(len(clients))
        used = set(np.unique(segment).tolist())
        return ClientStates(segment, row, (*(s for s in states.segments if s.number in used), new))

    def _rows(self, segment: Segment) -> Rows:
        if segment not in self._open:
            rows = self._mapped(segment.number)
            digest = hashlib.blake2b(digest_size=16)
            for i in range(0, len(rows), _CHUNK):
                digest.update(rows[i : i + _CHUNK].tobytes())
            if rows.shape != (segment.rows, self.size) or digest.hexdigest() != segment.digest:
                raise CheckpointError(
                    f"{self._path(segment.number)} is damaged or of another run: its rows are not those the checkpoint names"
                )
            self._open[segment] = rows
        return self._open[segment]

    def _mapped(self, number: int) -> Rows:
        path = self._path(number)
        try:
            rows: Rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} holds state of clients and cannot be read: {error}") from error
        return rows

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:07d}.npy"


def retain(directory: Path, kept: Sequence[ClientStates]) -> None:
    """Delete the segments under ``directory`` that none of ``kept`` reads."""
    used = {s.number for states in kept for s in states.segments}
    for path in directory.glob("[0-9]*.npy"):
        if int(path.stem) not in used:
            path.unlink()
