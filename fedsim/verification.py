"""Is a stored run what its simulation gives? Random blocks of its rounds are trained again and their hashes compared with those stored.

Whole rounds that have to be done on the way are compared as well, and so is every stored model that is passed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsim import encoding
from fedsim.local_training import train_unit
from fedsim.randomness import rng_for
from fedsim.records import Round
from fedsim.retracing import Part, Retraced, taken_apart
from fedsim.rounds import TrainState
from fedsim.runs.run import Run
from fedsim.runs.schema import column
from fedsim.runs.text import aligned
from fedsim.runtime.executor import Executor

T = TypeVar("T")
Key = tuple[int, int]  # a client, and the how manieth time it comes back in the round, from 0
Hashes = Mapping[Key, str]
_SHOWN = 10


@dataclass(frozen=True)
class Mismatch:
    """What differs after ``round``: the hash of a block of ``clients``, or of the stored model, which no clients name."""

    round: int
    clients: tuple[int, ...]
    stored: str
    found: str

    def __str__(self) -> str:
        who = f"clients {', '.join(map(str, self.clients))}" if self.clients else "the stored model after it"
        return f"round {self.round}, {who}: stored {self.stored or 'nothing'}, found {self.found or 'nothing'}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How many ``blocks`` and stored ``models`` of a run were compared, in which ``rounds``, and the ``mismatches``; ``notes`` say what was left out or has changed since."""

    blocks: int
    models: int
    rounds: tuple[int, ...]
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Everything that was compared is equal, and something was."""
        return not self.mismatches and self.blocks > 0

    def table(self) -> str:
        """The verdict, then what differs, then the notes."""
        verdict = f"{len(self.mismatches):,} differ" if self.mismatches else "all equal" if self.ok else "nothing to compare"
        cells = [f"{self.blocks:,}", f"{self.models:,}", _spans(self.rounds), verdict]
        shown = [str(m) for m in self.mismatches[:_SHOWN]]
        more = len(self.mismatches) - len(shown)
        rest = [f"and {more:,} more"] if more else []
        return "\n".join([aligned(["blocks", "models", "rounds", "hashes"], [cells]), *shown, *rest, *self.notes])


def verify(run: Run, blocks: int = 3, seed: int = 0, *, reach: int | None = 10, executor: Executor | None = None) -> Verification:
    """Train ``blocks`` random blocks of the rounds of ``run`` again, drawn with ``seed``, and compare their hashes with those stored.

    A round follows from those before it, back to a stored model or the seed's. Blocks are drawn from the first ``reach`` rounds after one of these, and
    stored models within ``reach`` of the one before are compared too; ``None`` draws from all rounds, which may take as long as the run did.
    """
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    if reach is not None and reach < 1:
        raise ValueError(f"reach must be at least 1 round, or None for all, got {reach}")
    retraced = Retraced(run, executor)
    stored = _stored_hashes(run, retraced.simulation.rounds)
    starts, far = retraced.starts(), len(stored) if reach is None else reach
    near = {round for round in stored for start in [_start(starts, round)] if round - start < far}
    chosen = _drawn({round: stored[round] for round in sorted(near)}, blocks, seed)
    walk = _Walk(retraced, stored)
    for start in starts:
        own = {round: clients for round, clients in chosen.items() if _start(starts, round) == start}
        if own:
            walk.stretch(start, own, far)
    return walk.verification(_notes(retraced, near, stored))


@dataclass(eq=False)
class _Walk:
    """The comparisons so far."""

    retraced: Retraced
    stored: Mapping[int, Hashes]
    blocks: int = 0
    models: int = 0
    rounds: set[int] = field(default_factory=set)
    mismatches: list[Mismatch] = field(default_factory=list)

    def stretch(self, start: int, chosen: Mapping[int, list[Key]], far: int) -> None:
        """From the state before round ``start``: whole rounds up to the next stored model, or else up to the last chosen one, of which only the blocks of the chosen clients."""
        state, last = self.retraced.start(start), max(chosen)
        following = min((s for s in self.retraced.checkpoints() if s > start), default=start + far + 1)
        end = following if following - start <= far else last
        while state.round < end:
            state, record = self.retraced.step(state)
            self._whole(record)
        if end == following:
            self._model(state)
        else:
            self._parts(state, chosen[last])

    def _whole(self, record: Round) -> None:
        found = _keyed(record.clients["client"].tolist(), record.clients["block"].tolist())
        for keys in _groups(found):
            self._compare(record.round, keys, found[keys[0]])
        self._absent(record.round, [k for k, block in self.stored.get(record.round, {}).items() if block and not found.get(k)])

    def _parts(self, state: TrainState, chosen: list[Key]) -> None:
        """Of the round after ``state`` only the blocks of the ``chosen``, each in its last merge."""
        local, done = self.retraced.local, set[Key]()
        parts = taken_apart(local, state, [client for client, _ in chosen])
        places = _places(parts, local.strategy.asynchronous)
        named = {(id(part), at): key for key, (part, at) in places.items()}
        self._absent(state.round, [key for key in chosen if key not in places])
        for key in chosen:
            if key in places and key not in done:
                part, at = places[key]
                block = part.block_at(at)
                (outcome,) = local.executor.map(train_unit, [block.unit], block.shared)
                first = at // block.unit.lanes * block.unit.lanes
                together = [(id(part), first + i) for i in range(len(block.unit.clients))]
                keys = [named[place] for place in together if place in named]
                self._compare(state.round, keys, str(outcome.blocks[0]))
                done.update(keys)

    def _compare(self, round: int, keys: list[Key], found: str) -> None:
        self.blocks += 1
        self.rounds.add(round)
        stored = self.stored.get(round, {})
        for hash in dict.fromkeys(stored.get(k, "") for k in keys):
            if hash != found:
                self.mismatches.append(Mismatch(round, tuple(c for c, t in keys if stored.get((c, t), "") == hash), hash, found))

    def _absent(self, round: int, keys: list[Key]) -> None:
        if keys:
            self.mismatches.append(Mismatch(round, tuple(c for c, _ in keys), self.stored[round][keys[0]], ""))

    def _model(self, state: TrainState) -> None:
        self.models += 1
        stored, found = (encoding.digest(params) for params in (self.retraced.stored(state.round).params, state.params))
        if stored != found:
            self.mismatches.append(Mismatch(state.round - 1, (), stored, found))

    def verification(self, notes: tuple[str, ...]) -> Verification:
        return Verification(
            blocks=self.blocks, models=self.models, rounds=tuple(sorted(self.rounds)), mismatches=tuple(self.mismatches), notes=notes
        )


def _start(starts: list[int], round: int) -> int:
    return max(s for s in starts if s <= round)


def _keyed(clients: Sequence[int], values: Sequence[T]) -> dict[Key, T]:
    """``values`` by client and the how manieth of it each is."""
    times: dict[int, int] = {}
    found: dict[Key, T] = {}
    for client, value in zip(clients, values, strict=True):
        times[client] = times.get(client, -1) + 1
        found[client, times[client]] = value
    return found


def _places(parts: Sequence[Part], asynchronous: bool) -> dict[Key, tuple[Part, int]]:
    """The unit, and the position in it, of each client's last merge in a round; of each time that it comes back where there are no rounds."""
    flat = [(client, (part, at)) for part in parts for at, client in enumerate(part.unit.clients.tolist())]
    found = _keyed([client for client, _ in flat], [place for _, place in flat])
    return found if asynchronous else {(client, 0): place for (client, _), place in found.items()}


def _groups(blocks: Hashes) -> list[list[Key]]:
    """Clients of each block, from each client's hash; those that uploaded nothing have none."""
    ordered = sorted((hash, key) for key, hash in blocks.items() if hash)
    return [[key for _, key in group] for _, group in groupby(ordered, key=lambda pair: pair[0])]


def _drawn(stored: Mapping[int, Hashes], number: int, seed: int) -> dict[int, list[Key]]:
    """A client each of ``number`` random blocks, by round."""
    blocks = [(round, keys[0]) for round, hashes in stored.items() for keys in _groups(hashes)]
    chosen: dict[int, list[Key]] = {}
    for index in np.sort(rng_for(seed, "verify").permutation(len(blocks))[:number]):
        round, key = blocks[index]
        chosen.setdefault(round, []).append(key)
    return chosen


def _stored_hashes(run: Run, rounds: int) -> dict[int, Hashes]:
    """Each client's hash in every stored round of training."""
    table = run.clients()
    number, client, block = (column(table, name) for name in ("round", "client", "block"))
    return {r: _keyed(client[number == r].tolist(), block[number == r].tolist()) for r in _rounds(number, rounds)}


def _rounds(numbers: NDArray[np.int64], rounds: int) -> Iterator[int]:
    return (r for r in np.unique(numbers).tolist() if r < rounds)


def _notes(retraced: Retraced, near: set[int], stored: Mapping[int, Hashes]) -> tuple[str, ...]:
    notes = []
    if left := tuple(sorted(set(stored) - near)):
        notes.append(f"not looked at: rounds {_spans(left)}, too far from a stored model; reach=None draws from them as well")
    if retraced.differences:
        notes.append(f"not as it was when the run was made: {', '.join(retraced.differences)}")
    return tuple(notes)


def _spans(rounds: tuple[int, ...]) -> str:
    """``0-9, 40``."""
    runs = [[r for _, r in group] for _, group in groupby(enumerate(rounds), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
