"""How a cohort is cut: every step of every client once, in the order the algorithm asks for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.runtime.batching import WORTH_FLOPS, Segment, blocks, chains, padded, power_of_two, segments, unit_size

ROUND = st.lists(st.sets(st.integers(1, 7), max_size=6), min_size=1, max_size=7).map(lambda rows: [(*sorted(r), 8) for r in rows])


@given(ROUND, st.booleans())
@settings(max_examples=100, deadline=None)
def test_segments_and_chains_cover_every_step_of_every_client_once(points, chained):
    cut = segments(points)
    cut = chains(cut) if chained else cut
    for client, own in enumerate(points):
        mine = sorted((s for s in cut if client in s.members), key=lambda s: s.start)
        assert [p for s in mine for p in s.points] == list(own)
        assert [s.start for s in mine] == [0, *[s.end for s in mine[:-1]]]


@given(ROUND)
@settings(max_examples=100, deadline=None)
def test_inside_a_chain_nobody_else_merges(points):
    for segment in chains(segments(points)):
        for inner in segment.points[:-1]:
            assert tuple(i for i, own in enumerate(points) if inner in own) == segment.members
        between = {p for own in points for p in own if segment.points[0] <= p <= segment.end}
        assert between == set(segment.points)


def test_a_group_that_merges_every_step_is_one_chain_beside_the_others():
    points = [(1, 2, 3, 4), (4,), (1, 2, 3, 4), (4,)]
    assert set(chains(segments(points))) == {Segment((0, 2), 0, (1, 2, 3, 4)), Segment((1, 3), 0, (4,))}


def test_blocks_cover_positions_and_only_the_last_is_short():
    assert blocks(70, 32) == ((0, 32), (32, 64), (64, 70))
    assert [padded(n, 32) for n in (1, 6, 31, 32)] == [8, 8, 32, 32]
    assert padded(1, 1) == 1
    assert padded(2, 2) == 2


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("num", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("flops", [1.0, 1e7, 1e12])
def test_units_are_powers_of_two_and_leave_work_for_everyone(num, workers, flops):
    size = unit_size(num, workers, flops)
    assert power_of_two(size, "size") <= num
    if workers > 1:
        assert num / size >= min(num, workers)
        if flops > WORTH_FLOPS and num >= 3 * workers:
            assert num / size >= 3 * workers
        if size < 16 and num / size >= 2 * workers:
            assert size * flops >= WORTH_FLOPS


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="lanes must be a power of two, got 12"):
        power_of_two(12, "lanes")
