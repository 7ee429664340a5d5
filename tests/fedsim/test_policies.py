"""Policies: when they ask, when they must not, and what they cannot see."""

import gc

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fedsim import encoding
from fedsim.policies import Never, Oracle, Periodic, Policy, RepruneOnAlarm, Switch, TrueView, View
from fedsim.reactions import Adapt, Reprune

C = 6
POLICIES = [Never(), Periodic(every=7), RepruneOnAlarm(latency=5, window=64), RepruneOnAlarm(confirm=2), Oracle(latency=5)]


def view_at(tick, in_flight=(), change_points=None):
    flying = np.isin(np.arange(C), in_flight)
    nothing, unknown = np.zeros(C, np.int64), np.full(C, np.nan)
    fields = {
        "tick": tick,
        "in_flight": flying,
        "last_action_tick": nothing - 1,
        "queue_length": 0,
        "region": np.zeros((C, 2)),
        **dict.fromkeys(("statistic", "recent_loss", "reference_loss"), unknown),
        **dict.fromkeys(("level", "device"), nothing),
    }
    return View(**fields) if change_points is None else TrueView(**fields, change_points=np.asarray(change_points))


def played(policy, alarms, ticks, service=3, change_points=None):
    """(tick, client) of every request, where each job is in flight for ``service`` ticks; ``alarms`` maps a tick to clients."""
    state, until, asked = policy.init(C), np.zeros(C, int), []
    for tick in range(ticks):
        flags = np.isin(np.arange(C), alarms(tick) if callable(alarms) else alarms.get(tick, ()))
        view = view_at(tick, np.flatnonzero(tick < until), change_points)
        state, proposals = policy.step(state, view, flags, np.random.default_rng(0))
        for p in proposals:
            assert not view.in_flight[p.client]
            until[p.client] = tick + 1 + service
            asked.append((tick, p.client))
    return asked


def test_never_never_asks():
    assert played(Never(), lambda t: range(C), 100) == []


def test_periodic_acts_on_client_c_at_c_modulo_the_period():
    assert played(Periodic(every=10), {}, 30) == [(t, c) for t in range(30) for c in range(C) if t % 10 == c]
    assert played(Periodic(every=4), {}, 8, service=1) == [(t, c) for t in range(8) for c in range(C) if t % 4 == c % 4]
    assert played(Periodic(every=10, stagger=False), {}, 20) == [(t, c) for t in (0, 10) for c in range(C)]


def test_periodic_skips_a_turn_while_its_last_action_is_in_flight():
    assert [t for t, c in played(Periodic(every=5), {}, 30, service=7) if c == 0] == [0, 10, 20]


def test_an_alarm_is_answered_at_once_for_that_client_alone():
    assert played(RepruneOnAlarm(), {4: [1], 9: [3, 5]}, 20) == [(4, 1), (9, 3), (9, 5)]


def test_cooldown_counts_from_the_end_of_the_action():
    asked = played(RepruneOnAlarm(cooldown=10), lambda t: [2], 60, service=6)
    assert [t for t, _ in asked] == [0, 17, 34, 51]
    at_once = played(RepruneOnAlarm(cooldown=0), lambda t: [2], 20, service=0)
    assert [t for t, _ in at_once] == list(range(20))


def test_confirmation_waits_for_alarms_close_together():
    policy = RepruneOnAlarm(confirm=3, cooldown=10)
    assert played(policy, {t: [0] for t in (0, 5, 9)}, 30) == [(9, 0)]
    assert played(policy, {t: [0] for t in (0, 5, 10)}, 30) == []
    assert played(policy, {t: [0] for t in (0, 5, 10, 13)}, 30) == [(13, 0)]
    assert played(policy, {0: [0], 1: [1], 2: [2]}, 30) == []


def test_the_oracle_acts_once_a_change_and_lag_ticks_after_it():
    nu = [5, -1, 0, 30, 99, 7]
    assert played(Oracle(), {}, 50, change_points=nu) == [(0, 2), (5, 0), (7, 5), (30, 3)]
    assert played(Oracle(lag=4), {}, 50, change_points=nu) == [(4, 2), (9, 0), (11, 5), (34, 3)]
    assert played(Oracle(), lambda t: range(C), 50, change_points=[-1] * C) == []


def test_the_oracle_waits_for_an_action_in_flight_and_serves_a_later_change_too():
    policy, state = Oracle(), Oracle().init(C)
    asked = []
    for tick in range(20):
        flying = [0] if tick < 8 else []
        nu = [5, *[-1] * 5] if tick < 12 else [12, *[-1] * 5]
        state, proposals = policy.step(state, view_at(tick, flying, nu), np.zeros(C, bool), np.random.default_rng(0))
        asked += [(tick, p.client) for p in proposals]
    assert asked == [(8, 0), (12, 0)]


def test_true_change_points_cannot_be_reached_from_a_view():
    true = view_at(3, change_points=np.full(C, 12345))
    plain = view_at(3)
    assert set(vars(true)) - set(vars(plain)) == {"change_points"}
    seen = []

    class Spy(Policy):
        def init(self, num_clients):
            return Never().init(num_clients)

        def step(self, state, view, alarms, rng):
            seen.append(view)
            return state, []

    spy = Spy()
    policy = Switch(first=Oracle(), then=spy, at=0)
    assert policy.clairvoyant
    policy.step(policy.init(C), true, np.zeros(C, bool), np.random.default_rng(0))
    assert type(seen[0]) is View
    assert not hasattr(seen[0], "change_points")
    assert not any(isinstance(v, np.ndarray) and 12345 in v for v in reachable(seen[0]))


def reachable(value, depth=4):
    found, todo = [], [(value, 0)]
    while todo:
        item, level = todo.pop()
        found.append(item)
        if level < depth and not isinstance(item, type):
            todo += [(r, level + 1) for r in gc.get_referents(item) if not isinstance(r, type) and type(r).__name__ != "module"]
    return found


def test_only_the_oracle_is_clairvoyant_and_refuses_a_plain_view():
    assert [p.clairvoyant for p in POLICIES] == [False, False, False, False, True]
    with pytest.raises(TypeError, match="TrueView"):
        Oracle().step(Oracle().init(C), view_at(0), np.zeros(C, bool), np.random.default_rng(0))


def test_other_policies_ask_alike_whatever_the_change_points_are():
    alarms = {t: [t % C] for t in range(0, 80, 3)}
    for policy in POLICIES[:-1]:
        assert played(policy, alarms, 80) == played(policy, alarms, 80, change_points=[5] * C)


def test_step_leaves_the_state_it_was_given_alone():
    for policy in POLICIES:
        state = policy.init(C)
        before = encoding.digest(state)
        policy.step(state, view_at(7, change_points=[7] * C), np.ones(C, bool), np.random.default_rng(0))
        assert encoding.digest(state) == before


@pytest.mark.parametrize("policy", [*POLICIES, Switch(first=Never(), then=Periodic(every=3), at=9)], ids=lambda p: type(p).__name__)
def test_policies_and_their_states_survive_encoding(policy):
    assert encoding.decode(*encoding.encode(policy)) == policy
    state, _ = policy.step(policy.init(C), view_at(3, change_points=[3] * C), np.ones(C, bool), np.random.default_rng(0))
    assert encoding.digest(encoding.decode(*encoding.encode(state))) == encoding.digest(state)


def test_switch_follows_one_policy_then_the_other():
    alarms = {t: [0] for t in (2, 30, 60)}
    policy = Switch(first=RepruneOnAlarm(), then=Periodic(every=20, stagger=False), at=40)
    assert played(policy, alarms, 70) == [(2, 0), (30, 0), *((t, c) for t in (40, 60) for c in range(C))]
    same = Switch(first=RepruneOnAlarm(), then=RepruneOnAlarm(), at=31)
    assert played(same, lambda t: [1], 90) == played(RepruneOnAlarm(), lambda t: [1], 90)


def test_fields_resolve_to_one_action():
    assert RepruneOnAlarm(latency=5).action == Reprune(labels="self", window=64)
    assert RepruneOnAlarm(latency=5) == RepruneOnAlarm(latency=5, window=64, labels="self")
    assert RepruneOnAlarm(window=32, labels="true").action == Reprune(labels="true", window=32)
    assert Periodic(every=50, action="adapt").action == Adapt(teacher="dense", window=64)
    assert Oracle(action="adapt", labels="true").action == Adapt(teacher="labels")
    given = RepruneOnAlarm(action=Reprune(tune_steps=16, window=128))
    assert (given.window, given.labels, given.action.tune_steps) == (128, "self", 16)
    _, (proposal,) = given.step(given.init(C), view_at(0), np.arange(C) == 4, np.random.default_rng(0))
    assert (proposal.client, proposal.action, proposal.latency) == (4, given.action, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepruneOnAlarm(window=7), "window must be a whole number, at least 8"),
        (lambda: RepruneOnAlarm(latency=-1), "latency"),
        (lambda: RepruneOnAlarm(confirm=0), "confirm"),
        (lambda: RepruneOnAlarm(confirm=5, cooldown=3), "cannot come within"),
        (lambda: RepruneOnAlarm(labels="none"), "labels"),
        (lambda: RepruneOnAlarm(action="adapt", labels="none"), "labels"),
        (lambda: RepruneOnAlarm(action="retrain"), "action"),
        (lambda: RepruneOnAlarm(action=Reprune(window=64), window=32), "contradicts"),
        (lambda: Periodic(every=0), "every"),
        (lambda: Oracle(lag=-1), "lag"),
        (lambda: Switch(first=Never(), then="never", at=3), "then must be a policy"),
    ],
)
def test_bad_policies_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_requests_come_in_client_order():
    state = RepruneOnAlarm().init(C)
    _, proposals = RepruneOnAlarm().step(state, view_at(0), np.ones(C, bool), np.random.default_rng(0))
    assert_array_equal([p.client for p in proposals], np.arange(C))
