"""Serving, tick by tick: test on the stream, watch, ask the policy, react on workers, redeploy.

Streams do not depend on policies, and a client's submodel is fixed between redeployments. So losses are computed for whole
blocks of ticks on the workers, and policies that are compared share them; the tick itself is array code over the fleet.
"""

# C clients, T ticks of a block, B examples a tick

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim import encoding
from fedsim.lanes import lanes_for, why_not_batched
from fedsim.monitoring import MonitorState
from fedsim.policies import PolicyState, Proposal, TrueView, View
from fedsim.pruning import Submodel
from fedsim.randomness import rng_for
from fedsim.reactions import Job, Outcome, needs_labels, react
from fedsim.records import Alarm, Event, Record, Redeployment, Rejected, Request, Started, Tick
from fedsim.runtime.executor import Executor, Needs
from fedsim.served import LANES, Ledger
from fedsim.served import TICKS_PER_BLOCK as TICKS_PER_BLOCK
from fedsim.served import Memo as Memo
from fedsim.served import ServeUnit as ServeUnit
from fedsim.served import serve_block as serve_block
from fedsim.stream import Stream
from fedsim.submodels import DenseModel, Deployed, Variant
from fedsim.workers import Queue

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

MANY = 4096  # clients; fewer are served one at a time unless Serving says otherwise
RECENT = 0.8  # weight of the past in the running mean of a client's loss

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pending:
    """A job on its way: its window fills (``ticks``), then it waits and runs (``finish`` -1 until a worker takes it)."""

    job: int
    proposal: Proposal
    asked: int
    ticks: tuple[int, ...] = ()
    outcome: Outcome | None = None
    deploys: int = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingState:
    """The fleet before tick ``tick``: all that decides what follows, so a copy of it is a branch point."""

    tick: int
    variant: Ints
    variants: tuple[Variant, ...]
    monitor: MonitorState
    policy: PolicyState
    queue: Queue
    pending: tuple[Pending, ...]
    recent_loss: Floats
    last_action_tick: Ints
    num_jobs: int


class Server:
    """Serves one simulation; holds what never changes, while :meth:`step` hands states along."""

    def __init__(
        self, simulation: "Simulation", stream: Stream, dense: DenseModel, deployed: Deployed, executor: Executor, memo: Memo | None
    ):
        self.simulation, self.stream, self.dense, self.deployed = simulation, stream, dense, deployed
        self.executor, self.memo = executor, {} if memo is None else memo
        self.num_clients = len(simulation.fleet)
        self.whole = Variant(Submodel.dense(dense.smap))
        gisp = simulation.deployment
        self.shared = {
            "task": executor.share(simulation.task),
            "params": executor.share(dense.params),
            "stream": executor.share(stream),
            "gisp": gisp,
            "model": dense.digest,
        }
        self.world = encoding.digest(dense.digest, simulation.serving, simulation.fleet, gisp, simulation.seed)
        self.ledger = Ledger(
            executor,
            self.shared,
            self.whole,
            self.num_clients,
            ticks=simulation.serving.ticks,
            batch=simulation.serving.batch,
            lanes=_lanes(simulation, dense),
            memo=memo,
            world=self.world,
        )

    @classmethod
    def prepare(
        cls,
        simulation: "Simulation",
        stream: Stream,
        params: NDArray[np.floating],
        deployed: Deployed,
        executor: Executor,
        memo: Memo | None,
    ) -> "Server":
        """``memo`` keeps losses by content, so runs in the same world share it; without one only the last block's are held."""
        dense = DenseModel.of(simulation.task, params, simulation.deployment)
        return cls(simulation, stream, dense, deployed, executor, memo)

    def init(self) -> ServingState:
        """The fleet before the first tick."""
        return ServingState(
            tick=0,
            variant=self.deployed.variant,
            variants=self.deployed.variants,
            monitor=self.simulation.monitoring.init(self.num_clients),
            policy=self.simulation.policy.init(self.num_clients),
            queue=self.simulation.workers.init(),
            pending=(),
            recent_loss=np.full(self.num_clients, np.nan),
            last_action_tick=np.full(self.num_clients, -1),
            num_jobs=0,
        )

    def step(self, state: ServingState) -> tuple[ServingState, tuple[Record, ...]]:
        """One tick: deploy what is due, test, watch, ask the policy, start jobs."""
        tick = state.tick
        active = self.simulation.serving.active(tick, self.num_clients, self.simulation.seed)
        state, deployed = self._deploy(state)
        losses, accuracy, dense_losses, dense_accuracy = self._losses(state, active)
        state, alarms, statistic, events = self._watch(state, losses, active)
        clients = np.flatnonzero(active)
        columns = {
            "client": clients,
            "loss": losses[clients],
            "accuracy": accuracy[clients],
            "statistic": statistic[clients],
            "dense_loss": dense_losses[clients],
            "dense_accuracy": dense_accuracy[clients],
        }
        # windows take the samples after the request, so those asked for now start with the next tick
        state, started = self._collect(state, active)
        state, requests = self._ask(state, alarms)
        state = replace(state, tick=tick + 1)
        return state, (*deployed, Tick(tick=tick, clients=columns), *events, *started, *requests)

    def _losses(self, state: ServingState, active: Flags) -> tuple[Floats, Floats, Floats, Floats]:
        """Loss and accuracy (C,) of the deployed and of the dense model at this tick; ``nan`` where a client is not active."""
        clients = np.flatnonzero(active)
        columns = np.full((4, self.num_clients), np.nan)
        columns[:, clients] = self.ledger.at(state.tick, clients, state.variants, state.variant[clients]).reshape(4, -1)
        return columns[0], columns[1], columns[2], columns[3]

    def _watch(self, state: ServingState, losses: Floats, active: Flags) -> tuple[ServingState, Flags, Floats, list[Event]]:
        """One detector step for the fleet: alarms, and statistics before those that alarmed restart, ``nan`` for clients that could not alarm:
        those whose law is being learnt, and those with an action under way."""
        monitoring = self.simulation.monitoring
        watched = monitoring.watched(state.monitor) & ~self._in_flight(state)
        monitor, alarms = monitoring.step(state.monitor, losses, active)
        alarms = alarms & watched
        began = monitoring.changed_at(monitor)
        statistic = np.where(watched, monitor.detector.statistic, np.nan)
        events: list[Event] = [
            Alarm(tick=state.tick, client=int(c), statistic=float(statistic[c]), changed_at=int(began[c])) for c in np.flatnonzero(alarms)
        ]
        recent = np.where(np.isnan(state.recent_loss), losses, RECENT * state.recent_loss + (1 - RECENT) * losses)
        recent = np.where(active, recent, state.recent_loss)
        return replace(state, monitor=monitoring.restart(monitor, alarms), recent_loss=recent), alarms, statistic, events

    def _ask(self, state: ServingState, alarms: Flags) -> tuple[ServingState, list[Event]]:
        """Let the policy decide; its requests begin to collect their windows."""
        rng = rng_for(self.simulation.seed, "policy", state.tick)
        policy, proposals = self.simulation.policy.step(state.policy, self._view(state), alarms, rng)
        self._check(proposals, self._in_flight(state))
        asked = [Pending(job=state.num_jobs + i, proposal=p, asked=state.tick) for i, p in enumerate(proposals)]
        events: list[Event] = [
            Request(tick=state.tick, client=p.proposal.client, job=p.job, detail=type(p.proposal.action).__name__.lower()) for p in asked
        ]
        last = state.last_action_tick.copy()
        last[[p.client for p in proposals]] = state.tick
        state = replace(state, policy=policy, pending=(*state.pending, *asked), last_action_tick=last, num_jobs=state.num_jobs + len(asked))
        return state, events

    def _check(self, proposals: Sequence[Proposal], in_flight: Flags) -> None:
        """``ValueError`` for a policy that asks for a client twice, for one with an action under way, or for one that does not exist."""
        busy = set(np.flatnonzero(in_flight).tolist())
        for client in (p.client for p in proposals):
            if client in busy or not 0 <= client < self.num_clients:
                raise ValueError(
                    f"{self.simulation.policy!r} asked for client {client}, which is not in the fleet or already has an action under way"
                )
            busy.add(client)

    def _view(self, state: ServingState) -> View:
        fleet = self.simulation.fleet
        seen: dict[str, Any] = {
            "tick": state.tick,
            "statistic": state.monitor.detector.statistic,
            "recent_loss": state.recent_loss,
            "reference_loss": state.monitor.reference,
            "last_action_tick": state.last_action_tick,
            "in_flight": self._in_flight(state),
            "level": self.deployed.level,
            "device": fleet.device,
            "region": fleet.region,
            "queue_length": len(state.queue),
        }
        if self.simulation.policy.clairvoyant:
            return TrueView(**seen, change_points=self.stream.change_points)
        return View(**seen)

    def _in_flight(self, state: ServingState) -> Flags:
        flags = np.zeros(self.num_clients, bool)
        flags[[p.proposal.client for p in state.pending]] = True
        return flags

    def _collect(self, state: ServingState, active: Flags) -> tuple[ServingState, list[Event]]:
        """Fill windows with this tick's samples; run the jobs whose window is full, and queue them."""
        batch = self.simulation.serving.batch
        pending = [
            replace(p, ticks=(*p.ticks, state.tick)) if p.outcome is None and active[p.proposal.client] else p for p in state.pending
        ]
        ready = [p for p in pending if p.outcome is None and len(p.ticks) * batch >= p.proposal.action.window]
        outcomes = dict(zip([p.job for p in ready], self._outcomes(state, ready), strict=True))
        queue = state.queue
        for p in ready:
            queue = self.simulation.workers.submit(queue, state.tick, p.job, outcomes[p.job].flops)
        queue, taken = self.simulation.workers.step(queue, state.tick)
        finish = {a.job: a.finish for a in taken}
        pending = [self._scheduled(replace(p, outcome=outcomes.get(p.job, p.outcome)), finish) for p in pending]
        events: list[Event] = [self._started(p, state.tick) for p in pending if p.job in finish]
        return replace(state, pending=tuple(pending), queue=queue), events

    def _scheduled(self, pending: Pending, finish: Mapping[int, int]) -> Pending:
        """When the result serves: after the latency, the worker and, for an accepted candidate, the download."""
        if pending.job not in finish:
            return pending
        assert pending.outcome is not None
        client, outcome = pending.proposal.client, pending.outcome
        download = outcome.bytes_down / float(self.simulation.fleet.down[client]) if outcome.accepted else 0.0
        workers = self.simulation.workers
        at = workers.deployed_at(pending.asked, pending.proposal.latency, finish[pending.job], download)
        return replace(pending, deploys=max(at, pending.ticks[-1] + 1))

    def _started(self, pending: Pending, tick: int) -> Event:
        assert pending.outcome is not None
        seconds = self.simulation.workers.seconds(pending.outcome.flops)
        return Started(
            tick=tick,
            client=pending.proposal.client,
            job=pending.job,
            ready_at=pending.deploys,
            seconds=seconds,
            bytes=pending.outcome.bytes_up,
        )

    def _outcomes(self, state: ServingState, ready: Sequence[Pending]) -> list[Outcome]:
        """Results of the jobs, each computed once however many policies ask for the same."""
        keys = [
            (
                self.world,
                self.executor.gpus_per_worker > 0,
                p.proposal.client,
                int(self.deployed.level[p.proposal.client]),
                p.ticks,
                encoding.digest(p.proposal.action),
                state.variants[state.variant[p.proposal.client]].digest,
            )
            for p in ready
        ]
        missing = [i for i, key in enumerate(keys) if key not in self.memo]
        if missing:
            jobs = [self._job(state, ready[i]) for i in missing]
            gpus = self.executor.gpus_per_worker
            shared = {**self.shared, "device": "cuda" if gpus else "cpu"}
            self.memo.update(zip([keys[i] for i in missing], self.executor.map(react, jobs, shared, Needs(gpus=gpus)), strict=True))
        return [self.memo[key] for key in keys]

    def _job(self, state: ServingState, pending: Pending) -> Job:
        client, action = pending.proposal.client, pending.proposal.action
        inputs, targets = self.stream.draw_at(client, pending.ticks)
        variant = state.variants[state.variant[client]]
        return Job(
            client=client,
            action=action,
            level=int(self.deployed.level[client]),
            inputs=inputs.reshape(-1, *inputs.shape[2:])[: action.window],
            targets=targets.reshape(-1, *targets.shape[2:])[: action.window] if needs_labels(action) else None,
            kept=variant.submodel.kept,
            weights=variant.weights,
            tick=state.tick,
        )

    def _deploy(self, state: ServingState) -> tuple[ServingState, list[Event]]:
        """Put accepted candidates that are due into service; let rejected ones go."""
        due = [p for p in state.pending if p.deploys == state.tick]
        if not due:
            return state, []
        variant, variants, events = state.variant.copy(), list(state.variants), []
        changed, released = np.zeros(self.num_clients, bool), np.zeros(self.num_clients, bool)
        for p in due:
            assert p.outcome is not None
            client = p.proposal.client
            events.append(_verdict(p, p.outcome, state.tick))
            (changed if p.outcome.accepted else released)[client] = True
            if p.outcome.accepted:
                old = variants[variant[client]].submodel
                variant[client] = len(variants)
                variants.append(Variant(replace(old, kept=p.outcome.kept), p.outcome.weights))
        monitor = self.simulation.monitoring.restart(self.simulation.monitoring.relearn(state.monitor, changed), released)
        pending = tuple(p for p in state.pending if p.deploys != state.tick)
        variant, kept = _compact(variant, variants)
        return replace(state, variant=variant, variants=kept, monitor=monitor, pending=pending), events


def _lanes(simulation: "Simulation", dense: DenseModel) -> int:
    """How many clients of one submodel are served as one program. Raises ``ValueError`` for a model that cannot be."""
    wanted, task = simulation.serving.lanes, simulation.task
    batch = task.data().test.batch([0] * 2)
    if wanted is None:
        many = len(simulation.fleet) >= MANY and simulation.deployment.calibration == "global"
        return LANES if many and lanes_for(task, dense.module, batch) > 1 else 1
    if wanted > 1 and (reason := why_not_batched(task, dense.module, batch)) is not None:
        raise ValueError(f"this model cannot be served as {wanted} lanes of one program ({reason}); use Serving(lanes=1)") from reason
    return wanted


def _verdict(pending: Pending, outcome: Outcome, tick: int) -> Event:
    kind = Redeployment if outcome.accepted else Rejected
    return kind(
        tick=tick,
        client=outcome.client,
        job=pending.job,
        detail=type(pending.proposal.action).__name__.lower(),
        bytes=outcome.bytes_down if outcome.accepted else 0,
        loss_dense=outcome.loss_dense,
        loss_stale=outcome.loss_stale,
        loss_candidate=outcome.loss_candidate,
    )


def _compact(variant: Ints, variants: Sequence[Variant]) -> tuple[Ints, tuple[Variant, ...]]:
    """Forget variants that nobody serves with."""
    used, index = np.unique(variant, return_inverse=True)
    return index.reshape(-1), tuple(variants[i] for i in used)
