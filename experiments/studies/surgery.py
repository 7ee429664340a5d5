"""Surgery equals mask, costs what the closed counts say, and runs faster: MLPs, CNNs and a ResNet-9 at every level.

GISP (arXiv:2510.18030) ranks structures on calibration examples: real digits for the digits models, random pictures for the CIFAR models,
which surgery cannot tell from real ones. Digits models are trained for a moment, so that their logits are those of a useful model. FLOPs
are counted by torch on the sliced module and compared with the closed count. Forward passes of dense and sliced modules
are timed in turn, on one thread.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.study import Claim, main, save_figure
from experiments.timing import flops_of, one_thread, timed
from fedsim.pruning import GISP, StructureMap, Submodel, structure_map
from fedsim.randomness import rng_for, torch_seeded
from fedsim.runs.style import INK, MARKERS, MUTED, SERIES, WIDE, figure, styled
from fedsim.runs.text import aligned, number
from fedsim.tasks import Batch, Digits
from fedsim.tasks.models import ResNet9, cifar_cnn

SAME, COUNTS, FASTER, NOT_SLOWER = "<= 0.00001 of the logits' size", "<= 0 mismatches", ">= 1.5 x", "> 1 x"
LEVELS = (0.0, 0.2, 0.4, 0.6)
WIDE_MLP = "MLP-1024"
BATCH, TRAINING_STEPS = 256, 60


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, the examples to calibrate on, and the inputs (B, ...) to compare and time."""

    name: str
    model: nn.Module
    calibration: Batch
    inputs: Tensor


@dataclass(frozen=True, kw_only=True)
class Row:
    """One level of one model. ``difference`` is max |mask - sliced| in units of max(1, largest logit),
    ``moved`` max |mask - dense|, ``ratios`` dense / sliced seconds of each repetition."""

    model: str
    level: float
    sparsity: float
    parameters: int
    flops: int
    mismatches: int
    flop_ratio: float
    largest: float
    moved: float
    difference: float
    seconds: float
    ratios: NDArray[np.float64]

    @property
    def speedup(self) -> float:
        return float(np.median(self.ratios))

    def cells(self) -> list[str]:
        low, high = np.quantile(self.ratios, (0.25, 0.75))
        return [
            *(self.model, f"{self.level:g}", f"{self.sparsity:.4f}", f"{self.parameters:,}", f"{self.flops:,}", str(self.mismatches)),
            *(f"{self.difference:.1e}", number(self.moved), number(self.largest), f"{1000 * self.seconds:.2f}", f"{self.flop_ratio:.2f}"),
            f"{self.speedup:.2f} ({low:.2f} to {high:.2f})",
        ]


def run(quick: bool, out: Path) -> list[Claim]:
    """With ``quick`` the ResNet-9 is timed on 8 pictures instead of 256, and calibrated on 8 instead of 64."""
    rows: list[Row] = []
    header = [
        "model",
        "level",
        "sparsity",
        "parameters",
        "FLOPs",
        "mismatches",
        "difference",
        "moved",
        "logit",
        "ms",
        "FLOP ratio",
        "speed-up (quartiles)",
    ]
    with one_thread():
        for setting in settings(quick):
            found = measure(setting)
            rows += found
            batch = len(setting.inputs)
            print(f"{setting.name}, batch {batch}, one thread\n{aligned(header, [r.cells() for r in found])}\n", flush=True)
    draw(rows, out / "speedup_by_flops.png")
    return judged(rows)


def judged(rows: Sequence[Row]) -> list[Claim]:
    worst = max(rows, key=lambda r: r.difference)
    sizes = f"logits reach {min(r.largest for r in rows):.2g} to {max(r.largest for r in rows):.2g}; differences in units of max(1, largest logit)"
    claims = [
        Claim(name="max |mask - sliced|, all models and levels", value=worst.difference, spread=nan, bar=SAME, seeds=1, note=sizes),
        Claim(name="parameter and FLOP counts that differ", value=sum(r.mismatches for r in rows), spread=nan, bar=COUNTS, seeds=1),
    ]
    for row in (r for r in rows if r.level == LEVELS[-1]):
        name, bar = f"{row.model} at {row.level:g}: dense / sliced time", FASTER if row.model == WIDE_MLP else NOT_SLOWER
        note = f"median of {len(row.ratios)}, FLOP ratio {row.flop_ratio:.2f}"
        claims.append(Claim(name=name, value=row.speedup, spread=nan, bar=bar, seeds=1, note=note))
    return claims


def settings(quick: bool) -> Iterator[Setting]:
    digits = {WIDE_MLP: Digits(hidden=(1024, 1024)), "MLP-256": Digits(hidden=(256, 256)), "digits CNN": Digits(model="cnn")}
    for name, task in digits.items():
        train, test = task.data()
        model = _trained(task)
        yield Setting(name=name, model=model, calibration=train.batch(range(BATCH)), inputs=test.batch(range(BATCH)).inputs)
    yield _pictures("CIFAR CNN", cifar_cnn, 64, BATCH)
    yield _pictures("ResNet-9", ResNet9, 8 if quick else 64, 8 if quick else BATCH)


def _trained(task: Digits) -> nn.Module:
    """A few dozen steps of Adam on random batches."""
    model, train = task.build(0), task.data().train
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = rng_for(0, "surgery", "batches")
    for _ in range(TRAINING_STEPS):
        optimiser.zero_grad()
        task.losses(model, train.batch(rng.integers(len(train), size=64))).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model


def _pictures(name: str, build: Callable[[], nn.Module], calibration: int, batch: int) -> Setting:
    """An untrained model for random CIFAR-like pictures in [0, 1]."""
    rng = rng_for(0, "surgery", name)
    inputs = torch.from_numpy(rng.random((calibration + batch, 3, 32, 32), np.float32))
    targets = torch.from_numpy(rng.integers(10, size=calibration))
    with torch_seeded(0, "surgery", name):
        model = build()
    return Setting(name=name, model=model, calibration=Batch(inputs[:calibration], targets), inputs=inputs[calibration:])


def measure(setting: Setting) -> list[Row]:
    """One trajectory, then every level: masked against sliced, counted, timed."""
    model = setting.model.eval()
    smap = structure_map(model, setting.inputs[:1])
    trajectory = GISP(levels=LEVELS).trajectory(model, smap, _losses, [setting.calibration])
    submodels = [trajectory.at(level) for level in LEVELS]
    modules = [submodel.sliced(model, smap) for submodel in submodels]
    with torch.inference_mode():
        dense, own = timed(model, modules, setting.inputs)
        rows = zip(submodels, modules, dense, own, strict=True)
        return [_row(setting, smap, *each) for each in rows]


def _row(
    setting: Setting, smap: StructureMap, submodel: Submodel, module: nn.Module, dense: NDArray[np.float64], own: NDArray[np.float64]
) -> Row:
    with submodel.masked(setting.model, smap) as masked:
        expected = masked(setting.inputs)
    largest = float(expected.abs().max())
    parameters, flops = sum(p.numel() for p in module.parameters()), flops_of(module, setting.inputs[:1])
    return Row(
        model=setting.name,
        level=submodel.level,
        sparsity=submodel.sparsity(smap),
        parameters=parameters,
        flops=flops,
        mismatches=int(parameters != submodel.parameters(smap)) + int(flops != submodel.flops(smap)),
        flop_ratio=flops_of(setting.model, setting.inputs[:1]) / flops,
        largest=largest,
        moved=float((expected - setting.model(setting.inputs)).abs().max()),
        difference=float((expected - module(setting.inputs)).abs().max()) / max(1.0, largest),
        seconds=float(np.median(own)),
        ratios=dense / own,
    )


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")


@styled
def draw(rows: Sequence[Row], path: Path) -> None:
    """One line a model; on the diagonal time falls as FLOPs do."""
    drawn = figure(WIDE * 0.65, 3.6)
    axes = drawn.subplots()
    top = max(max(r.flop_ratio, r.speedup) for r in rows)
    axes.plot([1, top], [1, top], color=MUTED, linewidth=0.8, linestyle=":", zorder=0)
    axes.annotate("time = FLOPs", (top, top), (-14, -2), textcoords="offset points", color=MUTED, fontsize=7, ha="right")
    for name, colour, marker in zip(dict.fromkeys(r.model for r in rows), SERIES, MARKERS, strict=False):
        own = [r for r in rows if r.model == name]
        low, high = np.quantile([r.ratios for r in own], (0.25, 0.75), axis=1)
        speedup = np.asarray([r.speedup for r in own])
        axes.errorbar(
            [r.flop_ratio for r in own], speedup, (speedup - low, high - speedup), color=colour, marker=marker, markersize=4, label=name
        )
    axes.axhline(1.0, color=INK, linewidth=0.6)
    axes.set(
        title="Speed-up of sliced models, levels 0, 0.2, 0.4, 0.6",
        xlabel="dense / sliced FLOPs",
        ylabel="dense / sliced time",
    )
    axes.legend(loc="upper left")
    save_figure(drawn, path)


if __name__ == "__main__":
    sys.exit(main("surgery", run))
