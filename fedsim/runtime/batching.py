"""How a cohort is cut: segments between merges, blocks of lanes, dispatch units. Pure, and apart from units decided by the cohort alone.

A *segment* is what clients that start from one model do until a merge they take part in. A segment whose merges concern
its own clients alone is chained with the next: it can stay on one worker. A *block* is a run of at most ``lanes``
positions that train as one program; a *unit* is an aligned run of ``2**j`` blocks sent to one worker.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedsim.clock import by_point

Span = tuple[int, int]
_MOST_BLOCKS = 16
WORTH_FLOPS = 2.5e8  # of a unit: about 50 ms of a core, twenty times what sending it costs


@dataclass(frozen=True)
class Segment:
    """Cohort positions ``members``, all of one model ``shape``, train from the model of point ``start`` to ``points[-1]``.

    At the points before it they merge among themselves.
    """

    members: tuple[int, ...]
    start: int
    points: tuple[int, ...]
    shape: int = 0

    @property
    def end(self) -> int:
        return self.points[-1]

    @property
    def last_start(self) -> int:
        """The point from whose model it goes to its end, chained or not: what orders the fold."""
        return self.points[-2] if len(self.points) > 1 else self.start


def segments(points: Sequence[tuple[int, ...]], shapes: Sequence[int] | None = None) -> tuple[Segment, ...]:
    """The round as segments of one point each, by point, by start and by model shape (``shapes`` (n,); ``None``: all alike)."""
    at, shape = [0] * len(points), [0] * len(points) if shapes is None else shapes
    cut = []
    for point, due in by_point(points):
        kinds: dict[tuple[int, int], list[int]] = {}
        for i in due.tolist():
            kinds.setdefault((at[i], shape[i]), []).append(i)
            at[i] = point
        cut += [Segment(tuple(members), start, (point,), kind) for (start, kind), members in sorted(kinds.items())]
    return tuple(cut)


def chains(cut: Sequence[Segment]) -> tuple[Segment, ...]:
    """Join each segment to the one before it where only its own clients merge there and no other merge lies between."""
    order = sorted({s.end for s in cut})
    following = dict(pairwise(order))
    merging = {end: [s for s in cut if s.end == end] for end in order}
    joined: dict[tuple[tuple[int, ...], int], Segment] = {}
    for segment in cut:
        before = joined.get((segment.members, segment.start))
        alone = before is not None and len(merging[segment.start]) == 1
        if before is not None and alone and following[segment.start] == segment.end:
            del joined[segment.members, segment.start]
            segment = Segment(segment.members, before.start, (*before.points, segment.end), segment.shape)
        joined[segment.members, segment.end] = segment
    return tuple(joined.values())


def blocks(count: int, lanes: int) -> tuple[Span, ...]:
    """Positions ``0..count`` in runs of ``lanes``; the last may be shorter.

    >>> blocks(20, 16)
    ((0, 16), (16, 20))
    """
    return tuple((low, min(low + lanes, count)) for low in range(0, count, lanes))


def padded(count: int, lanes: int) -> int:
    """Lanes a block of ``count`` clients computes: a multiple of 4, and 8 at least, because narrower kernels have bits of their own.

    >>> [padded(n, 32) for n in (1, 8, 9, 32)]
    [8, 8, 12, 32]
    """
    return count if lanes == 1 else min(lanes, max(8, -(-count // 4) * 4))


def unit_size(num_blocks: int, workers: int, block_flops: float) -> int:
    """Blocks in a unit: a power of two that leaves about three units to each worker and, unless that leaves fewer than one, is worth the trip.

    Not more than memory near the core takes. ``block_flops`` predicts what a block costs; it decides where work runs, never what comes out.
    """
    if workers == 1:
        return min(_MOST_BLOCKS, 1 << (num_blocks.bit_length() - 1))
    three_each = 1 << (max(1, num_blocks // (3 * workers)).bit_length() - 1)
    one_each = 1 << (max(1, num_blocks // workers).bit_length() - 1)
    worth = 1 << max(0, math.ceil(math.log2(WORTH_FLOPS / max(block_flops, 1.0))))
    return min(_MOST_BLOCKS, one_each, max(three_each, worth))


def power_of_two(value: int, name: str) -> int:
    """``value`` if it is a power of two, else ``ValueError``."""
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")
    return value
