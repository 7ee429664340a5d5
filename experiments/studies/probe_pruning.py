"""Probe Pruning beside masks that never change: perplexity and time against sparsity, at matched and at drifted calibration.

Three texts written in letters of their own (an encyclopaedia, plays, program code), batches of 20 x 128 tokens of one text, a Llama of 3 layers
trained here on all three; the history is of all, or of one only, as if the stream had moved. No layer is spared. Time is measured on a
wider model with random weights. Without ``--quick`` also 20 and 60 %.
"""

# D domains

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.language import SHAKESPEARE, WIKITEXT, text, trained
from experiments.study import Claim, main, save_figure
from experiments.timing import alternating, one_thread
from fedsim.llm.causal_lm import LanguageTask
from fedsim.llm.decoder import Decoder
from fedsim.llm.probe_pruning import ProbePruning
from fedsim.llm.probing import FLAPImportance, FullBatch, HistoryOnly, ProbeOnly, RandomProbe, WandaImportance
from fedsim.llm.text import PythonSource
from fedsim.runs.style import MARKERS, SERIES, WIDE, figure, styled
from fedsim.runs.text import aligned
from fedsim.tasks.base import Batch, Dataset, Splits

SEEDS = (0, 1, 2)
BATCH, LENGTH, LETTERS = 20, 128, 128
RULES: Mapping[str, Mapping[str, Any]] = {
    "fixed, PP score": {"fusion": HistoryOnly()},
    "fixed, Wanda-sp": {"fusion": HistoryOnly(), "importance": WandaImportance()},
    "fixed, FLAP": {"fusion": HistoryOnly(), "importance": FLAPImportance()},
    "PP": {},
    "PP, random probe": {"probe": RandomProbe()},
    "PP, probe only": {"fusion": ProbeOnly()},
    "full batch": {"probe": FullBatch(), "fusion": ProbeOnly()},
}
CALIBRATIONS = ("matched", "drifted")
Figures = Mapping[str, NDArray[np.float64]]  # (seeds, calibrations, sparsities) by rule


def run(quick: bool, out: Path) -> list[Claim]:
    """Three training seeds; 40 % alone with ``quick``."""
    levels = (0.4,) if quick else (0.2, 0.4, 0.6)
    dense, figures = measured(levels, out)
    at = levels.index(0.4)
    for place, calibration in enumerate(CALIBRATIONS):
        rows = [[name, *(f"{p:.2f}" for p in values[:, place].mean(0))] for name, values in figures.items()]
        print(
            aligned([f"{calibration} calibration; dense {dense.mean():.2f}", *(f"{s:.0%}" for s in levels)], rows), end="\n\n", flush=True
        )
    if not quick:
        draw(dense, figures, levels, out / "probe_pruning.png")
    found = []
    for place, calibration in enumerate(CALIBRATIONS):
        fixed, pp, at_random, whole = (figures[n][:, place, at] for n in ("fixed, PP score", "PP", "PP, random probe", "full batch"))
        print(f"{calibration}: at 40 %, perplexity of a random probe - of the residual probe {(at_random - pp).mean():+.3f}")
        closed = ((fixed - pp) / (fixed - whole)).tolist()
        name = f"{calibration} calibration: of the gap from fixed to full batch at 40 %, PP closes"
        found.append(Claim.measured(name, closed, bar=">= 0.8 of the gap" if calibration == "drifted" else "> 0 of the gap"))
    return [*found, *speed(9 if quick else 25, dense, figures, at)]


@dataclass(frozen=True)
class Letters:
    """Bytes of domain d as tokens 128 d ... 128 d + 127."""

    vocabulary: int = 3 * LETTERS
    end: int = 3 * LETTERS - 1
    pad: int = 3 * LETTERS - 1


@dataclass(frozen=True)
class ThreeTexts(LanguageTask):
    """Runs of three texts that share no letter."""

    seed: int
    model: Decoder = field(default_factory=lambda: Decoder(layers=3, width=96, heads=4, kv_heads=4, hidden=256))
    tokenizer: Any = field(default_factory=Letters)
    length: int = LENGTH

    def load(self) -> Splits:
        parts = [_runs(source.read().texts, domain) for domain, source in enumerate((text(WIKITEXT[0]), text(SHAKESPEARE), PythonSource()))]
        fewest = min(len(runs) for runs in parts)
        chosen = [runs[np.random.default_rng([self.seed, d]).permutation(len(runs))[:fewest]] for d, runs in enumerate(parts)]
        held = fewest // 5
        return Splits(train=_dataset([runs[held:] for runs in chosen]), test=_dataset([runs[:held] for runs in chosen]))

    @property
    def domain_names(self) -> tuple[str, ...]:
        return ("articles", "plays", "code")


def _runs(texts: Sequence[str], domain: int) -> NDArray[np.int64]:
    letters = np.frombuffer("\n".join(texts).encode("ascii", "ignore"), np.uint8)[:600_000].astype(np.int64)
    number = (len(letters) - 1) // LENGTH
    return np.stack([letters[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(number)]) + domain * LETTERS


def _dataset(parts: Sequence[NDArray[np.int64]]) -> Dataset:
    runs = np.concatenate(parts)
    domain = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    return Dataset(runs[:, :-1], runs[:, 1:], {"domain": domain})


def measured(levels: Sequence[float], out: Path) -> tuple[NDArray[np.float64], Figures]:
    """Geometric-mean perplexity over the domains: dense (seeds,), and of every rule (seeds, calibrations, sparsities)."""
    dense = []
    figures: dict[str, list[list[list[float]]]] = {name: [] for name in RULES}
    for seed in SEEDS:
        task = ThreeTexts(seed)
        model = trained(task, seed, steps=400, kept=out / "models")
        train, test = (batches_of(split, 6) for split in (task.data().train, task.data().test))
        dense.append(perplexity(task, model, test))
        calibrated = {"matched": [b.inputs for domain in train for b in domain[:4]], "drifted": [b.inputs for b in train[0]]}
        for name, changes in RULES.items():
            figures[name].append([[pruned(task, model, calibrated[c], test, level, changes) for level in levels] for c in CALIBRATIONS])
            print(f"seed {seed}  {name:18s}" + "  ".join(f"{p:7.3f}" for row in figures[name][-1] for p in row), flush=True)
    return np.array(dense), {name: np.array(values) for name, values in figures.items()}


def batches_of(data: Dataset, number: int) -> list[list[Batch]]:
    """``number`` batches of each domain."""
    places = [np.flatnonzero(data.keys["domain"] == d)[: number * BATCH] for d in range(3)]
    return [[data.batch(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)] for rows in places]


def pruned(
    task: LanguageTask,
    model: nn.Module,
    calibration: Sequence[Tensor],
    test: Sequence[Sequence[Batch]],
    level: float,
    changes: Mapping[str, Any],
) -> float:
    rule = ProbePruning(sparsity=level, skip=(), **changes)
    with rule.applied(model, rule.calibrate(model, calibration)):
        return perplexity(task, model, test)


def perplexity(task: LanguageTask, model: nn.Module, domains: Sequence[Sequence[Batch]]) -> float:
    with torch.no_grad():
        means = [np.mean([float(task.losses(model, batch).mean()) for batch in batches]) for batches in domains]
    return exp(float(np.mean(means)))


def speed(repeats: int, dense: NDArray[np.float64], figures: Figures, at: int) -> list[Claim]:
    """Seconds of a batch at 40 %: dense, with a fixed mask (gathered anew each batch), with PP."""
    model = ThreeTexts(0, Decoder(layers=4, width=512, heads=8, kv_heads=8, hidden=1408)).build(0).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, LETTERS, (BATCH, LENGTH)))

    def timed(changes: Mapping[str, Any] | None) -> Any:
        if changes is None:
            return lambda: _forward(model, tokens)
        rule = ProbePruning(sparsity=0.4, **changes)
        history = rule.calibrate(model, [tokens])

        def once() -> None:
            with rule.applied(model, history):
                _forward(model, tokens)
                _forward(model, tokens)

        return once

    runs = {"dense": lambda: (_forward(model, tokens), _forward(model, tokens)), **{n: timed(RULES[n]) for n in ("fixed, FLAP", "PP")}}
    with one_thread():
        seconds = alternating(runs, repeats)
    rule = ProbePruning(sparsity=0.4)
    with rule.applied(model, rule.calibrate(model, [tokens])) as session:
        _forward(model, tokens)
    middle = {name: median(values) / 2 for name, values in seconds.items()}
    print("seconds a batch: " + ", ".join(f"{name} {value:.3f}" for name, value in middle.items()))
    drifted = {name: figures[name][:, 1, at].mean() - dense.mean() for name in ("fixed, FLAP", "PP")}
    price = {name: drifted[name] / (1 - middle[name] / middle["dense"]) for name in drifted}
    print("perplexity lost per share of the time saved, drifted: " + ", ".join(f"{n} {p:.2f}" for n, p in price.items()))
    ratios = [d / p for d, p in zip(seconds["dense"], seconds["PP"], strict=True)]
    return [
        Claim(
            name="throughput at 40 %, PP / dense, 20 x 128 tokens of width 512",
            value=median(ratios),
            spread=(max(ratios) - min(ratios)) / 2,
            bar=">= 1.25 x",
            seeds=1,
        ),
        Claim(
            name="probe / dense FLOPs at the default probe",
            value=session.flops.probe / session.flops.dense,
            spread=0.0,
            bar="<= 0.02",
            seeds=1,
        ),
        Claim(
            name="drifted: perplexity lost per share of time saved, FLAP / PP",
            value=price["fixed, FLAP"] / price["PP"],
            spread=float("nan"),
            bar="> 1 x",
            seeds=len(SEEDS),
        ),
    ]


def _forward(model: nn.Module, tokens: Tensor) -> None:
    with torch.no_grad():
        model(tokens)


@styled
def draw(dense: NDArray[np.float64], figures: Figures, levels: Sequence[float], path: Path) -> None:
    drawn = figure(WIDE, 3.6)
    panels = drawn.subplots(1, 2, sharey=True)
    for place, (axes, calibration) in enumerate(zip(panels, CALIBRATIONS, strict=True)):
        for (name, values), colour, marker in zip(figures.items(), SERIES, MARKERS, strict=False):
            axes.plot(levels, values[:, place].mean(0), label=name, color=colour, marker=marker, markersize=4)
        axes.axhline(float(dense.mean()), color="grey", linewidth=0.8)
        axes.set(title=f"{calibration} calibration", xlabel="sparsity")
    panels[0].set(ylabel="perplexity")
    panels[0].legend(fontsize=7)
    save_figure(drawn, path)


if __name__ == "__main__":
    sys.exit(main("probe_pruning", run))
