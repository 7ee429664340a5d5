"""Losses that rank structures for a purpose: right answers against wrong ones; and any loss with less memory.

An objective is a callable of a model and a batch that returns one loss for each example. A task's ``losses`` is one too.
"""

# B examples, A options each, L tokens

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedsim.llm.causal_lm import IGNORED, LanguageTask
from fedsim.pruning.gradients import Objective
from fedsim.tasks.base import Batch


class Choices(NamedTuple):
    """Questions with up to ``A`` answers, the right one first: inputs and targets (B, A, L), targets ignored outside the answers.

    An answer with all its targets ignored is absent: questions may have fewer than A.
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Margin:
    """How far the right answer stands above the wrong ones, in nats a token, as a loss (B,).

    ``mean_wrong`` is its loss less the mean loss of the wrong ones, as in the code of arXiv:2510.18030, which also rewards making wrong
    answers less likely; ``best_wrong`` is softplus of its loss less that of the best wrong one, bounded below and flat once the right one leads.
    """

    task: LanguageTask
    kind: Literal["best_wrong", "mean_wrong"] = "best_wrong"

    def __post_init__(self) -> None:
        if self.kind not in ("best_wrong", "mean_wrong"):
            raise ValueError(f"kind must be 'best_wrong' or 'mean_wrong', got {self.kind!r}")

    def __call__(self, model: nn.Module, batch: Choices) -> Tensor:
        losses = answer_losses(self.task, model, batch)
        right, wrong = losses[:, 0], losses[:, 1:]
        if self.kind == "best_wrong":
            return F.softplus(right - wrong.amin(1))
        present = _present(batch)[:, 1:]
        return right - torch.where(present, wrong, 0).sum(1) / present.sum(1)


def answer_losses(task: LanguageTask, model: nn.Module, batch: Choices) -> Tensor:
    """Mean loss of each answer's tokens (B, A), infinite for absent ones.

    Raises ``ValueError`` for fewer than two answers, naming a question without a right or without any wrong one.
    """
    if batch.inputs.ndim != 3 or batch.inputs.shape[1] < 2:
        raise ValueError(f"choices must be (questions, at least 2 answers, tokens), got shape {tuple(batch.inputs.shape)}")
    present = _present(batch)
    if bool((lone := ~present[:, 0] | ~present[:, 1:].any(1)).any()):
        raise ValueError(f"question {int(torch.nonzero(lone)[0, 0])} has no right answer, or no wrong one: all its targets are ignored")
    targets = torch.where(present[..., None], batch.targets, 0)  # any token: a mean of nothing would spoil the gradients of the others
    losses = task.losses(model, Batch(batch.inputs.flatten(0, 1), targets.flatten(0, 1)))
    return torch.where(present, losses.view(present.shape), torch.inf)


def _present(batch: Choices) -> Tensor:
    """Which answers a question has (B, A)."""
    return (batch.targets != IGNORED).any(2)


def chosen_rightly(task: LanguageTask, model: nn.Module, batch: Choices) -> Tensor:
    """1.0 where the right answer is the likeliest, else 0.0 (B,)."""
    with torch.no_grad():
        return (answer_losses(task, model, batch).argmin(1) == 0).float()


@dataclass(frozen=True)
class Checkpointed:
    """``objective`` with the activations inside every decoder layer computed again in the backward pass: memory for a third more compute.

    Works in evaluation mode, where transformers leaves checkpointing off. Raises ``ValueError`` for a model without such layers, or one
    whose layers would begin to drop out.
    """

    objective: Objective

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"{type(model).__name__} has no layers that can be checkpointed")
        if any(getattr(layer, "dropout", 0.0) for layer in layers if isinstance(getattr(layer, "dropout", 0.0), float)):
            raise ValueError(f"the layers of {type(model).__name__} drop out while training; set its dropout to 0 before checkpointing")
        modes = [(layer.training, layer.gradient_checkpointing, vars(layer).get(FUNCTION)) for layer in layers]
        try:
            for layer in layers:  # only the layer itself: what it holds stays in evaluation mode
                layer.training = layer.gradient_checkpointing = True
                setattr(layer, FUNCTION, _AGAIN)
            return self.objective(model, batch)
        finally:
            for layer, (training, checkpointing, function) in zip(layers, modes, strict=True):
                layer.training, layer.gradient_checkpointing = training, checkpointing
                if function is not None:
                    setattr(layer, FUNCTION, function)


FUNCTION = "_gradient_checkpointing_func"  # what transformers calls in place of a layer's forward
_AGAIN = partial(checkpoint, use_reentrant=False)
