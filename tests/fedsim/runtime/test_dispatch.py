"""Which unit goes where, without any worker: simulated by hand and by a plain event loop in simulated seconds."""

import heapq
from itertools import count

import numpy as np
import pytest

from fedsim.runtime.dispatch import Dispatch, Member
from fedsim.runtime.executor import NOTHING, Needs

GPU = Needs(gpus=0.5)


def sent_at_once(dispatch, now=0.0):
    """What goes out until nothing changes: (position of the member, unit), in order."""
    calls, out = count(), []
    while chosen := dispatch.next(now):
        member, unit = chosen
        dispatch.sent(member, unit, ("call", unit, next(calls)), now)
        out.append((dispatch.members.index(member), unit))
    return out


def finish(dispatch, member, now=0.0):
    """The member's oldest call ends."""
    return dispatch.arrived(member, next(iter(member.calls)), now)


def test_the_costliest_go_first_and_one_waits_at_a_worker_while_the_queue_is_long():
    dispatch = Dispatch([Member(), Member()], [NOTHING] * 6, [1, 9, 3, 8, 2, 7])
    # 9 and 8 run; 7 waits behind 8, which has less ahead; the last three stay for whoever is free first
    assert sent_at_once(dispatch) == [(0, 1), (1, 3), (1, 5)]
    assert finish(dispatch, dispatch.members[1]) == 3
    assert sent_at_once(dispatch) == []
    assert finish(dispatch, dispatch.members[1]) == 5
    assert sent_at_once(dispatch) == [(1, 2)]
    assert finish(dispatch, dispatch.members[0]) == 1
    assert sent_at_once(dispatch) == [(0, 4)]


def test_without_costs_units_go_in_their_order():
    dispatch = Dispatch([Member(), Member()], [NOTHING] * 20)
    assert sent_at_once(dispatch) == [(0, 0), (1, 1), (0, 2), (1, 3)]


def test_one_worker_always_has_a_unit_waiting():
    dispatch = Dispatch([Member()], [NOTHING] * 2)
    assert sent_at_once(dispatch) == [(0, 0), (0, 1)]


def test_units_that_need_a_gpu_go_only_to_workers_that_have_one_and_before_others():
    dispatch = Dispatch([Member(gpus=0.5), Member(), Member()], [NOTHING, GPU, NOTHING, GPU, NOTHING, NOTHING], [9, 1, 8, 2, 7, 6])
    out = sent_at_once(dispatch)
    assert out == [(0, 3), (1, 0), (2, 2)]
    finish(dispatch, dispatch.members[0])
    assert sent_at_once(dispatch) == [(0, 1)]
    finish(dispatch, dispatch.members[0])
    assert sent_at_once(dispatch) == [(0, 4)], "once no unit needs its GPU it helps with the others"


def test_a_worker_that_has_not_started_gets_nothing():
    members = [Member(started=False), Member()]
    dispatch = Dispatch(members, [NOTHING] * 4)
    assert {place for place, _ in sent_at_once(dispatch)} == {1}
    members[0].started = True
    assert {place for place, _ in sent_at_once(dispatch)} == {0}


def test_the_units_of_a_lost_worker_go_first_and_the_one_that_ran_is_suspected():
    members = [Member(), Member()]
    dispatch = Dispatch(members, [NOTHING] * 8)
    sent_at_once(dispatch)
    lost = members[0]
    assert list(lost.calls.values()) == [0, 2]
    assert dispatch.lost(lost, "killed") == 0
    members[0] = Member()
    assert sent_at_once(dispatch) == [(0, 0), (0, 2)]
    assert dispatch.losses == {0: ["killed"]}


def test_a_worker_lost_while_it_did_what_nobody_waits_for_blames_no_unit():
    members = [Member()]
    members[0].calls["of the last map"] = None
    dispatch = Dispatch(members, [NOTHING])
    assert sent_at_once(dispatch) == [(0, 0)]
    assert dispatch.lost(members[0], "killed") is None
    assert dispatch.losses == {}
    assert sent_at_once(dispatch) == [(0, 0)]


def test_a_unit_that_ran_out_of_memory_gets_a_node_to_itself():
    members = [Member(node="a"), Member(node="a"), Member(node="b")]
    dispatch = Dispatch(members, [NOTHING] * 4)
    assert sent_at_once(dispatch) == [(0, 0), (1, 1), (2, 2)]
    assert dispatch.lost(members[0], "memory", memory=True) == 0
    assert sent_at_once(dispatch) == [(0, 3)], "neither node is quiet"
    finish(dispatch, members[2])
    assert sent_at_once(dispatch) == [(2, 0)]
    finish(dispatch, members[1])
    finish(dispatch, members[0])
    assert dispatch.remaining == 1


def test_others_wait_while_such_a_unit_runs_on_their_node_alone():
    members = [Member(node="a"), Member(node="a")]
    dispatch = Dispatch(members, [NOTHING] * 3)
    sent_at_once(dispatch)
    dispatch.lost(members[0], "memory", memory=True)
    finish(dispatch, members[1])
    assert sent_at_once(dispatch) == [(0, 0)]
    finish(dispatch, members[0])
    assert sent_at_once(dispatch) == [(0, 2)]


def test_with_twice_an_idle_worker_does_a_slow_unit_again_and_the_first_result_counts():
    members = [Member(), Member()]
    dispatch = Dispatch(members, [NOTHING] * 3, twice=True)
    sent_at_once(dispatch)
    finish(dispatch, members[0], now=1.0)
    sent_at_once(dispatch, now=1.0)
    finish(dispatch, members[0], now=2.0)
    assert sent_at_once(dispatch, now=2.9) == []
    assert sent_at_once(dispatch, now=3.1) == [(0, 1)]
    assert finish(dispatch, members[0], now=4.0) == 1
    assert dispatch.remaining == 0
    assert finish(dispatch, members[1], now=5.0) is None, "the slow one came second"


def test_a_lost_copy_leaves_the_original_and_a_lost_original_its_copy():
    for first_lost in (0, 1):
        members = [Member(), Member()]
        dispatch = Dispatch(members, [NOTHING] * 2, twice=True)
        sent_at_once(dispatch)
        finish(dispatch, members[1], now=1.0)
        assert sent_at_once(dispatch, now=9.0) == [(1, 0)]
        assert dispatch.lost(members[first_lost], "killed") == 0
        assert sent_at_once(dispatch, now=9.0) == []
        assert finish(dispatch, members[1 - first_lost], now=10.0) == 0
        assert dispatch.remaining == 0


def makespan(costs, predicted, speeds, twice=False):
    """Seconds until all units are done, by an event loop: workers do their calls in order, each ``cost / speed`` seconds long."""
    members = [Member() for _ in speeds]
    dispatch = Dispatch(members, [NOTHING] * len(costs), predicted, twice)
    events, free = [], [0.0] * len(speeds)
    now = 0.0
    while dispatch.remaining:
        while chosen := dispatch.next(now):
            member, unit = chosen
            place = members.index(member)
            free[place] = max(free[place], now) + costs[unit] / speeds[place]
            call = object()
            dispatch.sent(member, unit, call, now)
            heapq.heappush(events, (free[place], id(call), place, call))
        if events and events[0][0] <= now + 0.05:
            now, _, place, call = heapq.heappop(events)
            dispatch.arrived(members[place], call, now)
        else:
            now = now + 0.05 if twice else events[0][0]
    return now


@pytest.mark.parametrize("workers", [2, 4, 7])
def test_known_costs_end_as_soon_as_longest_first_without_calls_sent_ahead(workers):
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(100):
        costs = rng.lognormal(0.0, 1.0, rng.integers(workers, 6 * workers)).tolist()
        loads = [0.0] * workers
        for cost in sorted(costs, reverse=True):
            heapq.heapreplace(loads, loads[0] + cost)
        ratios.append(makespan(costs, costs, [1.0] * workers) / max(loads))
    assert np.mean(ratios) < 1.05
    assert max(ratios) < 1.25


def test_predicted_costs_end_a_map_sooner_than_the_order_of_units():
    rng = np.random.default_rng(1)
    gains = []
    for _ in range(200):
        costs = rng.lognormal(0.0, 1.0, 12).tolist()
        gains.append(makespan(costs, None, [1.0, 1.0]) / makespan(costs, costs, [1.0, 1.0]))
    assert np.mean(gains) > 1.05
    assert np.quantile(gains, 0.05) > 0.95


def test_doing_slow_units_twice_saves_a_map_from_a_worker_that_crawls():
    costs = [1.0] * 12
    assert makespan(costs, None, [1.0, 0.05]) > 2 * makespan(costs, None, [1.0, 0.05], twice=True)


def test_every_unit_is_done_once_whatever_is_lost_and_when():
    rng = np.random.default_rng(2)
    for trial in range(100):
        members = [Member(gpus=float(i % 2), node=str(i // 2)) for i in range(1 + trial % 5)]
        needs = [Needs(gpus=float(rng.integers(2) if len(members) > 1 else 0)) for _ in range(20)]
        dispatch = Dispatch(members, needs, rng.random(20).tolist(), twice=bool(trial % 2))
        done, now = [], 0.0
        while dispatch.remaining:
            now += rng.random()
            sent_at_once(dispatch, now)
            busy = [m for m in members if m.calls]
            member = busy[rng.integers(len(busy))]
            for unit in (u for u in member.calls.values() if u is not None):
                assert needs[unit].gpus <= member.gpus
            assert len(member.calls) <= 2
            if rng.random() < 0.2:
                dispatch.lost(member, "killed", memory=bool(rng.integers(2)))
                members[members.index(member)] = Member(gpus=member.gpus, node=member.node)
            else:
                done.append(finish(dispatch, member, now))
        assert sorted(u for u in done if u is not None) == list(range(20))
