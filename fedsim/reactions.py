"""What a worker does for one client after an alarm: re-prune from the dense model or adapt the deployed submodel, then ask a gate.

Re-pruning is GISP (arXiv:2510.18030) calibrated on the client's window, by default with the dense model's own predictions as
targets: as good as labels where model and labels agree, better where they do not. The first two thirds of the window
calibrate or tune; on the last third the candidate must beat the deployed submodel, or it is rejected.

Exports: Action, Adapt, Job, Outcome, Reprune, react, redeploy_bytes, worth_it.
"""

# n examples of a window, S structures, P parameters of the dense model, Q of a submodel

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.errors import DivergedError
from fedsim.parameters import Layout
from fedsim.pruning import Submodel, regrown
from fedsim.submodels import DenseModel, Variant, dense_model
from fedsim.tasks import Batch, Task

Vector = NDArray[np.floating]
SMALLEST_WINDOW = 8
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Reprune:
    """A new submodel at the client's level, calibrated on ``window`` examples.

    ``mode="restart"`` prunes the dense model anew; "regrow" starts from the deployed structures and swaps what pays
    (:func:`fedsim.pruning.regrown`), so less has to be shipped.

    ``labels="self"`` takes the dense model's predictions as targets, "true" the labels; ``gate`` says by which of the two the held-out third
    is judged. ``tune_steps`` Adam steps at ``lr``
    may follow; keep them below half the window. Raises ``ValueError`` for a window below 8 examples.
    """

    labels: Literal["self", "true"] = "self"
    gate: Literal["true", "self"] = "true"
    mode: Literal["restart", "regrow"] = "restart"
    tune_steps: int = 0
    lr: float = 1e-3
    window: int = 64

    def __post_init__(self) -> None:
        _check_choice("labels", self.labels, ("self", "true"))
        _check_choice("gate", self.gate, ("true", "self"))
        _check_choice("mode", self.mode, ("restart", "regrow"))
        _check_numbers(self, tune_steps=0)


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """The deployed submodel, tuned by ``steps`` Adam steps at ``lr`` on ``window`` examples: only its last layer ("head") or all of it.

    ``teacher="labels"`` learns the labels; "dense" learns the dense model's probabilities (Hinton et al., arXiv:1503.02531). ``gate`` as in :class:`Reprune`.
    """

    part: Literal["head", "all"] = "all"
    teacher: Literal["labels", "dense"] = "dense"
    gate: Literal["true", "self"] = "true"
    steps: int = 32
    lr: float = 1e-3
    window: int = 64

    def __post_init__(self) -> None:
        _check_choice("part", self.part, ("head", "all"))
        _check_choice("teacher", self.teacher, ("labels", "dense"))
        _check_choice("gate", self.gate, ("true", "self"))
        _check_numbers(self, steps=1)

    @property
    def labels(self) -> Literal["self", "true"]:
        """Whether the action needs true labels, in the words of :class:`Reprune`."""
        return "true" if self.teacher == "labels" else "self"


Action = Reprune | Adapt


def needs_labels(action: Action) -> bool:
    """Whether the window of ``action`` must carry true labels."""
    return action.labels == "true" or action.gate == "true"


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One action for one client: its window, ``inputs`` (n, ...) and ``targets`` (n,) or none, and what it serves now.

    ``kept`` (S,) structures; ``weights`` (Q,) if they were tuned, ``None`` where they are the dense model's. ``level`` is an index into
    the pruner's levels.
    """

    client: int
    action: Action
    level: int
    inputs: NDArray[Any]
    targets: NDArray[np.int64] | None
    kept: NDArray[np.bool_]
    weights: Vector | None = None
    tick: int = 0

    def __post_init__(self) -> None:
        if len(self.inputs) < SMALLEST_WINDOW:
            raise ValueError(f"a window needs at least {SMALLEST_WINDOW} examples, got {len(self.inputs)} from client {self.client}")
        if self.targets is None and self.action.labels == "true":
            raise ValueError(f"{self.action} needs true labels, but the window of client {self.client} has none")


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """The candidate and the gate's verdict. Losses are means over the held-out third, ``gain`` = stale - candidate, with its standard error.

    ``weights`` is ``None`` where they are the dense model's at the ``kept`` structures. ``bytes_down`` is what a
    redeployment would ship, whatever the verdict.
    """

    client: int
    accepted: bool
    kept: NDArray[np.bool_]
    weights: Vector | None
    loss_dense: float
    loss_stale: float
    loss_candidate: float
    gain: float
    gain_error: float
    flops: float
    bytes_up: int
    bytes_down: int


def react(job: Job, shared: Mapping[str, Any], cache: MutableMapping[Any, Any]) -> Outcome:
    """Do ``job``, a pure function of the job and of ``shared``: "task", "params" (P,), "gisp", "model" and, if not "cpu", "device".

    ``cache`` only saves time. A GPU rounds differently, so runs that reserve one for reactions are equal among themselves.
    Raises ``DivergedError`` where a loss of the gate is not finite.
    """
    task, dense = shared["task"], dense_model(shared, cache)
    # torch takes no read-only arrays, and a worker's arrays are read-only
    device = shared.get("device", "cpu")
    inputs = torch.from_numpy(np.array(job.inputs)).to(device)
    targets = None if job.targets is None else torch.from_numpy(np.array(job.targets)).to(device)
    split = len(inputs) - len(inputs) // 3
    stale = Variant(Submodel(job.kept, dense.smap.fingerprint, shared["gisp"].levels[job.level]), job.weights)
    window = Batch(inputs[:split], _predicted(task, dense, inputs[:split]) if targets is None else targets[:split])
    act = _reprune if isinstance(job.action, Reprune) else _adapt
    candidate, flops = act(job, shared, dense, stale, window)

    judged_by = None if job.action.gate == "self" else targets
    held = Batch(inputs[split:], _predicted(task, dense, inputs[split:]) if judged_by is None else judged_by[split:])
    models = (dense.module, dense.sliced(stale), dense.sliced(candidate))
    loss_dense, loss_stale, loss_candidate = (_losses(task, model, held, job) for model in models)
    gain, error = _paired(loss_stale, loss_candidate)
    return Outcome(
        client=job.client,
        accepted=worth_it(loss_stale, loss_candidate),
        kept=candidate.submodel.kept,
        weights=candidate.weights,
        loss_dense=float(loss_dense.mean()),
        loss_stale=float(loss_stale.mean()),
        loss_candidate=float(loss_candidate.mean()),
        gain=gain,
        gain_error=error,
        flops=flops,
        bytes_up=job.inputs.nbytes + (0 if job.targets is None else job.targets.nbytes),
        bytes_down=redeploy_bytes(dense, stale, candidate),
    )


def worth_it(stale: NDArray[np.float64], candidate: NDArray[np.float64]) -> bool:
    """Whether losses (n,) of a candidate beat those of the deployed submodel, example by example: better in mean by more than one standard error.

    >>> worth_it(np.array([1.0, 1.2, 0.9]), np.array([0.5, 0.6, 0.5])), worth_it(np.ones(3), np.ones(3))
    (True, False)
    """
    gain, error = _paired(stale, candidate)
    return gain > max(error, 0.0)


def redeploy_bytes(dense: DenseModel, old: Variant, new: Variant) -> int:
    """Bytes that turn what a client holds into ``new``: scalars it lacks, all kept scalars of a tensor in which one it holds changes,
    and one bit a structure where the mask changes."""
    held, wanted = np.zeros(dense.layout.size, bool), np.zeros(dense.layout.size, bool)
    held[old.submodel.indices(dense.smap)], wanted[new.submodel.indices(dense.smap)] = True, True
    changed = held & wanted & (_scattered(dense, old) != _scattered(dense, new))
    scalars = 0
    for start, stop in zip(dense.layout.offsets, dense.layout.offsets[1:], strict=False):
        part = slice(start, stop)
        scalars += int((wanted[part] if changed[part].any() else wanted[part] & ~held[part]).sum())
    mask = 0 if np.array_equal(old.submodel.kept, new.submodel.kept) else ceil(len(new.submodel.kept) / 8)
    return scalars * dense.params.itemsize + mask


def _reprune(job: Job, shared: Mapping[str, Any], dense: DenseModel, stale: Variant, window: Batch) -> tuple[Variant, float]:
    """The candidate and the FLOPs spent: 3 F n T for T pruning steps on a window of n, and 3 F_sub b s for s tuning steps on b examples."""
    assert isinstance(job.action, Reprune)
    task, pruner, action = shared["task"], shared["gisp"], job.action
    if action.labels == "self":
        window = window._replace(targets=_predicted(task, dense, window.inputs))
    batches = [Batch(*(part[i : i + _BATCH] for part in window)) for i in range(0, len(window.inputs), _BATCH)]
    if action.mode == "regrow":
        found = regrown(pruner, dense.module, dense.smap, task.losses, batches, stale.submodel)
        submodel, flops = found.submodel, float(found.passes) * Submodel.dense(dense.smap).flops(dense.smap) * len(window.inputs)
    else:
        trajectory = pruner.trajectory(dense.module, dense.smap, task.losses, batches, deployed=dense.sliced(stale))
        submodel, flops = trajectory.at(pruner.levels[job.level]), pruner.flops(dense.smap, len(window.inputs))
    if action.tune_steps == 0:
        return Variant(submodel), flops
    small = dense.sliced(Variant(submodel))
    weights = _tuned(small, small, lambda: task.losses(small, window).mean(), action.tune_steps, action.lr)
    return Variant(submodel, weights), flops + 3.0 * submodel.flops(dense.smap) * len(window.inputs) * action.tune_steps


def _adapt(job: Job, shared: Mapping[str, Any], dense: DenseModel, stale: Variant, window: Batch) -> tuple[Variant, float]:
    """The deployed submodel with new weights, and the FLOPs spent: 3 F_sub b s for s steps on b examples."""
    assert isinstance(job.action, Adapt)
    task, action = shared["task"], job.action
    small = dense.sliced(stale)
    with torch.no_grad():
        soft = F.softmax(task.logits(dense.module, window.inputs), dim=-1)

    def from_dense() -> Tensor:
        cross = -(soft * F.log_softmax(task.logits(small, window.inputs), dim=-1)).sum(-1)
        return cross[window.targets >= 0].mean()  # of a text, the tokens that are asked for

    def from_labels() -> Tensor:
        losses: Tensor = task.losses(small, window)
        return losses.mean()

    objective = from_dense if action.teacher == "dense" else from_labels
    weights = _tuned(small, _head(small) if action.part == "head" else small, objective, action.steps, action.lr)
    return Variant(stale.submodel, weights), 3.0 * stale.submodel.flops(dense.smap) * len(window.inputs) * action.steps


def _tuned(model: nn.Module, part: nn.Module, objective: Callable[[], Tensor], steps: int, lr: float) -> Vector:
    """The model's flat parameters after ``steps`` Adam steps on those of ``part``."""
    layout = Layout.of(model)
    adam = torch.optim.Adam(part.parameters(), lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        objective().backward()  # type: ignore[no-untyped-call]
        adam.step()
    return layout.flatten(model)


def _head(model: nn.Module) -> nn.Module:
    """The last module, in order of registration, that owns parameters."""
    return [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None][-1]


def _predicted(task: Task, dense: DenseModel, inputs: Tensor) -> Tensor:
    """The dense model's own labels."""
    with torch.no_grad():
        return task.self_targets(dense.module, inputs)


def _scattered(dense: DenseModel, variant: Variant) -> Vector:
    """The variant's values at its kept coordinates of a dense vector (P,)."""
    return dense.params if variant.weights is None else variant.submodel.scatter(variant.weights, dense.params, dense.smap)


def _losses(task: Task, model: nn.Module, batch: Batch, job: Job) -> NDArray[np.float64]:
    with torch.no_grad():
        losses = task.losses(model, batch).double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise DivergedError(
            f"non-finite loss in the gate of {type(job.action).__name__} at tick {job.tick}", client=job.client, round=job.tick
        )
    return losses


def _paired(stale: NDArray[np.float64], candidate: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of ``stale - candidate`` and its standard error."""
    difference = np.asarray(stale, np.float64) - np.asarray(candidate, np.float64)
    if len(difference) < 2:
        raise ValueError(f"the gate needs at least 2 held-out examples, got {len(difference)}")
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _check_numbers(action: Reprune | Adapt, **lowest: int) -> None:
    for name, least in {"window": SMALLEST_WINDOW, **lowest}.items():
        value = getattr(action, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
    if not 0 < action.lr < float("inf"):
        raise ValueError(f"lr must be positive and finite, got {action.lr!r}")
