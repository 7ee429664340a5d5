"""Small language models that studies train on one core and keep by content, so that a second study does not train them again."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from experiments.study import Skipped
from fedsim.encoding import digest
from fedsim.llm.causal_lm import LanguageTask
from fedsim.llm.structures import language_structures
from fedsim.llm.text import Source, TextFile, WikiText
from fedsim.pruning import PruningTrajectory, StructureMap
from fedsim.randomness import rng_for
from fedsim.tasks.base import Batch, Dataset

SHAKESPEARE = Path("tinyshakespeare/input.txt")
WIKITEXT = Path("wikitext2/valid.txt"), Path("wikitext2/test.txt")


def text(path: Path) -> Source:
    """A text under ``FEDSIM_DATA``, or else beside the repository; ``Skipped`` where it is not."""
    root = os.environ.get("FEDSIM_DATA")
    found = (Path(root) if root else Path(__file__).parents[2] / "shared" / "data") / path
    if not found.is_file():
        raise Skipped(f"there is no {found}; set FEDSIM_DATA to the folder that holds {path.parent}/")
    return WikiText(str(found)) if path in WIKITEXT else TextFile(str(found))


def trained(task: LanguageTask, seed: int, *, steps: int = 700, batch: int = 32, lr: float = 3e-3, kept: Path | None = None) -> nn.Module:
    """The task's model after ``steps`` of Adam under a cosine, warmed up over a tenth; read from the folder ``kept`` where it lies there."""
    model = task.build(seed)
    file = None if kept is None else kept / f"{digest(task, seed, steps, batch, lr, _data(task))}.pt"
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    train, rng = task.data().train, rng_for(seed, "language", "batches")
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimiser.zero_grad()
        task.losses(model, train.batch(rng.integers(len(train), size=batch))).mean().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        torch.save(model.state_dict(), partial)
        partial.rename(file)
    return model.eval()


def _data(task: LanguageTask) -> str:
    return digest(task.data().train.inputs, task.data().test.inputs)


def calibration(data: Dataset, number: int, seed: int, size: int = 16) -> list[Batch]:
    """``number`` random examples in batches of ``size``."""
    chosen = np.sort(rng_for(seed, "language", "calibration").permutation(len(data))[:number])
    return [data.batch(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def perplexity(task: LanguageTask, model: nn.Module, data: Dataset, batch: int = 64) -> float:
    """exp of the mean loss over all tokens asked for."""
    total = number = 0.0
    with torch.no_grad():
        for start in range(0, len(data), batch):
            part = data.batch(np.arange(start, min(start + batch, len(data))))
            total += float(task.token_losses(model, part).double().sum())
            number += int((part.targets >= 0).sum())
    return math.exp(total / number)


def perplexities(
    task: LanguageTask, model: nn.Module, smap: StructureMap, trajectory: PruningTrajectory, levels: Sequence[float], data: Dataset
) -> list[float]:
    """Perplexity of the submodel at each of ``levels``."""
    return [perplexity(task, trajectory.at(level).sliced(model, smap), data) for level in levels]


def layers_of(model: nn.Module, task: LanguageTask) -> StructureMap:
    """The map whose structures are whole layers."""
    return language_structures(model, task.length, units=("layer",))
