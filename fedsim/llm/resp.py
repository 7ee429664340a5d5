"""RESP (arXiv:2512.02185): prune a reasoning model on what it writes itself, and let it write anew as it gets smaller.

Calibration texts are the model's own solutions, the loss counts generated tokens only, and each time sparsity passes a milestone the
pruned model generates them again. Calibration on other people's solutions, or on questions, keeps the wrong structures.
"""

# n examples of a batch, L tokens

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import CollapsedError
from fedsim.llm.causal_lm import IGNORED
from fedsim.llm.generation import Trace, check_count, check_sampling, generate
from fedsim.llm.tokens import Tokenizer
from fedsim.pruning.gisp import GISP
from fedsim.pruning.schedule import Progress
from fedsim.pruning.structures import StructureMap
from fedsim.randomness import rng_for
from fedsim.tasks.base import Batch

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RESP(GISP):
    """GISP on self-generated traces. Batches need questions only: of each example, what comes before the first target asked for.

    Before the first step ``deployed``, where given, else the dense model writes a trace for every question; whenever sparsity has passed a
    milestone the model as pruned so far writes anew for a share ``refresh`` of them (at least one, unless it is 0), with the coins each question
    has among all. ``keep`` says which new traces replace the old: "all" (as published), those that "finished", or the "correct" ones, whose ``answer`` equals that of the example's own targets; the others keep
    the older trace. Where not one finishes, ``CollapsedError`` is raised, or with ``on_collapse="keep_old"`` every example stays as it was,
    before the first step its own targets. Raises ``ValueError`` for fields out of range, and for an example whose targets ask for
    nothing, as its question has no end.
    """

    tokenizer: Tokenizer
    steps: int = 20
    milestones: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    refresh: float = 1.0
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 512
    keep: Literal["all", "finished", "correct"] = "all"
    answer: Callable[[str], Any] | None = None
    on_collapse: Literal["raise", "keep_old"] = "raise"
    generation_batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 < m < 1 for m in self.milestones) or any(a >= b for a, b in pairwise(self.milestones)):
            raise ValueError(f"milestones must be rising sparsities in (0, 1), got {self.milestones!r}")
        if not 0 <= self.refresh <= 1:
            raise ValueError(f"refresh must be a share in [0, 1], got {self.refresh!r}")
        check_sampling(self.temperature, self.top_p)
        for name in ("max_new_tokens", "generation_batch"):
            check_count(name, getattr(self, name))
        for name, allowed in (("keep", ("all", "finished", "correct")), ("on_collapse", ("raise", "keep_old"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if (self.keep == "correct") != (self.answer is not None):
            raise ValueError(
                f"answer= says when a trace is correct, and goes with keep='correct'; got keep={self.keep!r}, answer={self.answer!r}"
            )

    def flops(self, smap: StructureMap, examples: int) -> float:
        """Those of the gradients, and one forward pass over each trace that is generated."""
        dense = float(smap.cost("flops", np.zeros(len(smap.blocks), np.int64)))
        return super().flops(smap, examples) + dense * examples * (1 + self.refresh * sum(m < self.levels[-1] for m in self.milestones))

    def calibration_for(self, batches: Sequence[Any], progress: Progress) -> Sequence[Any]:
        if progress.first:
            author = progress.model if progress.deployed is None else progress.deployed
            return self._rewritten(batches, author, progress, np.arange(sum(len(b.inputs) for b in batches)))
        if self.refresh == 0 or not any(progress.before < m <= progress.sparsity for m in self.milestones):
            return batches
        number = sum(len(b.inputs) for b in batches)
        chosen = rng_for(self.seed, "resp", "refresh", progress.step).permutation(number)[: max(round(self.refresh * number), 1)]
        return self._rewritten(batches, progress.pruned(), progress, np.sort(chosen))

    def _rewritten(self, batches: Sequence[Batch], author: torch.nn.Module, progress: Progress, chosen: Ints) -> Sequence[Batch]:
        rows = [_split(inputs, targets, number) for number, (inputs, targets) in enumerate(_rows(batches))]
        traces = generate(
            author,
            [rows[i][0] for i in chosen],
            end=self.tokenizer.end,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            index=progress.step,
            ids=chosen,
            batch=self.generation_batch,
        )
        if not any(trace.finished for trace in traces):
            return self._collapsed(batches, len(traces), progress)
        for i, trace in zip(chosen.tolist(), traces, strict=True):
            if self._wanted(trace, rows[i][1]):
                rows[i] = rows[i][0], trace.tokens
        sizes = np.cumsum([0, *(len(b.inputs) for b in batches)])
        return [_batch(rows[a:b], self.tokenizer.pad, batches[0].inputs.device) for a, b in pairwise(sizes.tolist())]

    def _wanted(self, trace: Trace, old: Ints) -> bool:
        if self.keep == "all" or self.answer is None:
            return self.keep == "all" or trace.finished
        written, before = (self.answer(self.tokenizer.decode(tokens)) for tokens in (trace.tokens, old))
        return trace.finished and written is not None and written == before

    def _collapsed(self, batches: Sequence[Batch], number: int, progress: Progress) -> Sequence[Batch]:
        if self.on_collapse == "keep_old":
            return batches
        raise CollapsedError(
            f"none of {number} traces ended within max_new_tokens={self.max_new_tokens} at sparsity {progress.sparsity:.3f}"
            f" (pruning step {progress.step}); stop at a lower level, raise max_new_tokens, or set on_collapse='keep_old'"
        )


def _rows(batches: Sequence[Batch]) -> list[tuple[Ints, Ints]]:
    return [(i, t) for b in batches for i, t in zip(b.inputs.cpu().numpy(), b.targets.cpu().numpy(), strict=True)]


def _split(inputs: Ints, targets: Ints, number: int) -> tuple[Ints, Ints]:
    """Question and answer of one example (L,)."""
    asked = np.flatnonzero(targets != IGNORED)
    if not len(asked):
        raise ValueError(
            f"calibration example {number} asks for no token, so it has no question; every question ends where its answer begins"
        )
    return inputs[: asked[0] + 1], targets[asked]


def _batch(rows: Sequence[tuple[Ints, Ints]], pad: int, device: torch.device) -> Batch:
    """Questions and traces, padded at the right; only the traces are asked for."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    inputs, targets = np.full((len(rows), width), pad, np.int64), np.full((len(rows), width), IGNORED, np.int64)
    for row, (prompt, answer) in enumerate(rows):
        whole = np.concatenate([prompt, answer])
        inputs[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = answer
    return Batch(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
