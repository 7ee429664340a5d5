"""When to act: a policy turns alarms into requests for an action. It sees a :class:`View` of the fleet, never the true change points.

A policy asks for nothing while an action for the client is in flight or within ``cooldown`` ticks of its end.

Exports: ActingPolicy, Never, Oracle, Periodic, Policy, PolicyState, Proposal, RepruneOnAlarm, Switch, TrueView, View.
"""

# C clients

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.reactions import Action as Action
from fedsim.reactions import Adapt as Adapt
from fedsim.reactions import Reprune as Reprune

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_LONG_AGO = -(2**40)


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """What a policy may know at ``tick``: one entry a client (C,), unknown losses ``nan``, ``last_action_tick`` -1 for never."""

    tick: int
    statistic: Floats
    recent_loss: Floats
    reference_loss: Floats
    last_action_tick: Ints
    in_flight: Flags
    level: Ints
    device: NDArray[np.integer]
    region: Floats
    queue_length: int


@dataclass(frozen=True, eq=False, kw_only=True)
class TrueView(View):
    """A view with the true ``change_points`` (C,), -1 for never: for clairvoyant baselines alone."""

    change_points: Ints


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A request: do ``action`` for ``client``, to be done ``latency`` ticks after now at the earliest; the download, at least a tick, comes on top.

    Raises ``ValueError`` for a negative latency.
    """

    client: int
    action: Action
    latency: int

    def __post_init__(self) -> None:
        check_whole("latency", self.latency, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class PolicyState:
    """``quiet_until`` (C,): the first tick each client may be acted upon again."""

    quiet_until: Ints


class Policy(ABC):
    """Base of policies: frozen dataclasses whose state is a value."""

    @property
    def clairvoyant(self) -> bool:
        """Whether ``step`` must be given a :class:`TrueView`."""
        return False

    @abstractmethod
    def init(self, num_clients: int) -> PolicyState: ...

    @abstractmethod
    def step(self, state: PolicyState, view: View, alarms: Flags, rng: np.random.Generator) -> tuple[PolicyState, list[Proposal]]:
        """Next state and the requests of this tick, by client; ``alarms`` (C,) are those raised now."""


@dataclass(frozen=True)
class Never(Policy):
    """Do nothing: the cost of drift."""

    def init(self, num_clients: int) -> PolicyState:
        return PolicyState(quiet_until=np.zeros(num_clients, np.int64))

    def step(self, state: PolicyState, view: View, alarms: Flags, rng: np.random.Generator) -> tuple[PolicyState, list[Proposal]]:
        return state, []


@dataclass(frozen=True, kw_only=True)
class ActingPolicy(Policy):
    """Base of policies that act. A subclass says for whom, in :meth:`due`.

    ``action`` is "reprune", "adapt" or a full action. ``window`` (64 examples unless the action says otherwise) is collected
    from the request on; ``labels`` are the dense model's own ("self") or the "true" ones. Raises ``ValueError`` for a window below 8.
    """

    latency: int = 5
    window: int | None = None
    cooldown: int = 20
    labels: Literal["self", "true"] | None = None
    action: str | Action = "reprune"

    def __post_init__(self) -> None:
        for name in ("latency", "cooldown"):
            check_whole(name, getattr(self, name), 0)
        action = _resolve(self.action, self.window, self.labels)
        for name, value in (("action", action), ("window", action.window), ("labels", action.labels)):
            object.__setattr__(self, name, value)

    def init(self, num_clients: int) -> PolicyState:
        return PolicyState(quiet_until=np.zeros(num_clients, np.int64))

    def step(self, state: PolicyState, view: View, alarms: Flags, rng: np.random.Generator) -> tuple[PolicyState, list[Proposal]]:
        free = ~view.in_flight & (view.tick >= state.quiet_until)
        state, chosen = self.due(state, view, alarms & free)
        chosen = chosen & free
        assert not isinstance(self.action, str)
        # an action that has just been asked for ends next tick at the earliest; one still in flight pushes the quiet time on
        quiet = np.where(chosen | view.in_flight, view.tick + 1 + self.cooldown, state.quiet_until)
        proposals = [Proposal(client=int(c), action=self.action, latency=self.latency) for c in np.flatnonzero(chosen)]
        return replace(state, quiet_until=quiet), proposals

    @abstractmethod
    def due(self, state: PolicyState, view: View, alarms: Flags) -> tuple[PolicyState, Flags]:
        """Clients (C,) to act upon, if they are free; ``alarms`` (C,) are those of free clients."""


@dataclass(frozen=True, kw_only=True)
class Periodic(ActingPolicy):
    """Act upon every client each ``every`` ticks, alarm or not: client c at ticks c mod ``every`` (``stagger``), or all at once."""

    every: int
    stagger: bool = True
    cooldown: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("every", self.every, 1)

    def due(self, state: PolicyState, view: View, alarms: Flags) -> tuple[PolicyState, Flags]:
        offset = np.arange(len(alarms)) if self.stagger else np.zeros(len(alarms), np.int64)
        return state, (view.tick - offset) % self.every == 0


@dataclass(frozen=True, eq=False, kw_only=True)
class AlarmState(PolicyState):
    """``alarms_at`` (C, confirm): ticks of each client's last alarms, newest first, long ago where there was none."""

    alarms_at: Ints


@dataclass(frozen=True, kw_only=True)
class RepruneOnAlarm(ActingPolicy):
    """Act upon a client that raised ``confirm`` alarms within ``cooldown`` ticks (one at once, by default)."""

    confirm: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("confirm", self.confirm, 1)
        if self.confirm > max(self.cooldown, 1):
            raise ValueError(
                f"confirm={self.confirm} alarms cannot come within cooldown={self.cooldown} ticks; lower one or raise the other"
            )

    def init(self, num_clients: int) -> AlarmState:
        return AlarmState(quiet_until=np.zeros(num_clients, np.int64), alarms_at=np.full((num_clients, self.confirm), _LONG_AGO))

    def due(self, state: PolicyState, view: View, alarms: Flags) -> tuple[PolicyState, Flags]:
        assert isinstance(state, AlarmState)
        newest = np.column_stack([np.full(len(alarms), view.tick), state.alarms_at[:, :-1]])
        alarms_at = np.where(alarms[:, None], newest, state.alarms_at)
        confirmed = alarms & (alarms_at[:, -1] > view.tick - max(self.cooldown, 1))
        return replace(state, alarms_at=np.where(confirmed[:, None], _LONG_AGO, alarms_at)), confirmed


@dataclass(frozen=True, eq=False, kw_only=True)
class OracleState(PolicyState):
    """``served`` (C,): the change point each client was last acted upon for, -1 for none."""

    served: Ints


@dataclass(frozen=True, kw_only=True)
class Oracle(ActingPolicy):
    """Act ``lag`` ticks after each true change point, once: the bound on what better detection could bring to this action."""

    lag: int = 0
    cooldown: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("lag", self.lag, 0)

    @property
    def clairvoyant(self) -> bool:
        return True

    def init(self, num_clients: int) -> OracleState:
        return OracleState(quiet_until=np.zeros(num_clients, np.int64), served=np.full(num_clients, -1, np.int64))

    def due(self, state: PolicyState, view: View, alarms: Flags) -> tuple[PolicyState, Flags]:
        assert isinstance(state, OracleState)
        if not isinstance(view, TrueView):
            raise TypeError(f"Oracle needs the true change points of a TrueView, got a {type(view).__name__}")
        nu = view.change_points
        chosen = (nu >= 0) & (view.tick >= nu + self.lag) & (nu != state.served)
        chosen &= ~view.in_flight & (view.tick >= state.quiet_until)
        return replace(state, served=np.where(chosen, nu, state.served)), chosen


@dataclass(frozen=True, eq=False, kw_only=True)
class SwitchState(PolicyState):
    """The states of both policies."""

    first: PolicyState
    then: PolicyState


@dataclass(frozen=True, kw_only=True)
class Switch(Policy):
    """``first`` until tick ``at``, then ``then``: what a fork serves under. Switching to an equal policy changes nothing."""

    first: Policy
    then: Policy
    at: int

    def __post_init__(self) -> None:
        check_whole("at", self.at, 0)
        for name in ("first", "then"):
            if not isinstance(getattr(self, name), Policy):
                raise ValueError(f"{name} must be a policy, got {getattr(self, name)!r}")

    @property
    def clairvoyant(self) -> bool:
        return self.first.clairvoyant or self.then.clairvoyant

    def init(self, num_clients: int) -> SwitchState:
        first, then = self.first.init(num_clients), self.then.init(num_clients)
        return SwitchState(quiet_until=first.quiet_until, first=first, then=then)

    def step(self, state: PolicyState, view: View, alarms: Flags, rng: np.random.Generator) -> tuple[PolicyState, list[Proposal]]:
        assert isinstance(state, SwitchState)
        if view.tick < self.at or self.first == self.then:
            after, proposals = self.first.step(state.first, _for(self.first, view), alarms, rng)
            return replace(state, first=after, quiet_until=after.quiet_until), proposals
        after, proposals = self.then.step(state.then, _for(self.then, view), alarms, rng)
        return replace(state, then=after, quiet_until=after.quiet_until), proposals


def check_whole(name: str, value: object, lowest: int) -> None:
    """``ValueError`` unless ``value`` is a whole number of at least ``lowest``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be a whole number, at least {lowest}, got {value!r}")


def _for(policy: Policy, view: View) -> View:
    """``view`` without the true change points, unless ``policy`` is clairvoyant."""
    if policy.clairvoyant or not isinstance(view, TrueView):
        return view
    return View(**{name: getattr(view, name) for name in View.__dataclass_fields__})


def _resolve(action: str | Action, window: int | None, labels: str | None) -> Action:
    """The full action meant by a policy's fields; ``ValueError`` where they contradict each other."""
    if labels not in (None, "self", "true"):
        raise ValueError(f"labels must be 'self' or 'true', got {labels!r}")
    if action == "reprune":
        return Reprune(window=64 if window is None else window, labels=labels or "self")  # type: ignore[arg-type]
    if action == "adapt":
        return Adapt(window=64 if window is None else window, teacher="labels" if labels == "true" else "dense")
    if not isinstance(action, Reprune | Adapt):
        raise ValueError(f"action must be 'reprune', 'adapt', a Reprune or an Adapt, got {action!r}")
    for name, value in (("window", window), ("labels", labels)):
        if value is not None and value != getattr(action, name):
            raise ValueError(f"{name}={value!r} contradicts the action's own {getattr(action, name)!r}; give it in one place")
    return action
