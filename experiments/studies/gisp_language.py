"""Perplexity against sparsity of small language models: GISP beside one look at the gradients and the published rules.

Shakespeare by characters and, without ``--quick``, WikiText-2 by bytes; a Llama of 0.75 M parameters trained here; every seed draws its
own split, model and calibration set of 64 runs. GISP takes 20 steps to 60 %; levels are shares of the prunable parameters, FLAP has its
bias, ShortGPT stands at the deepest cut that fits. A decision task, which of four sums is right, is then pruned for its own margin and for
the perplexity of the texts it is taken from.
"""

# L levels

import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import nan
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from experiments.language import SHAKESPEARE, WIKITEXT, calibration, perplexity, text, trained
from experiments.studies.resp_reasoning import task as sums_task
from experiments.study import Claim, main, save_figure
from fedsim.llm.causal_lm import CausalLM
from fedsim.llm.decoder import Decoder
from fedsim.llm.objectives import Choices, Margin, chosen_rightly
from fedsim.llm.reasoning_task import Reasoning
from fedsim.llm.structures import language_structures
from fedsim.llm.tokens import Bytes, Characters
from fedsim.pruning import FLAP, GISP, FirstOrder, LLMPruner, Magnitude, OneShot, Pruner, Random, ShortGPT, WandaSP, compensate
from fedsim.pruning.activations import moments
from fedsim.randomness import rng_for
from fedsim.runs.style import MARKERS, SERIES, WIDE, figure, styled
from fedsim.runs.text import aligned
from fedsim.tasks.base import Batch

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SEEDS = (0, 1, 2)
MODEL = Decoder(layers=4, width=128, heads=8, kv_heads=4, hidden=352)
PRUNERS: Mapping[str, Callable[[int], Pruner]] = {
    "GISP": lambda seed: GISP(levels=LEVELS, steps=20),
    "one-shot": lambda seed: OneShot(levels=LEVELS),
    "GISP, published normalisation": lambda seed: GISP(levels=LEVELS, steps=20, importance=FirstOrder(normalise="published")),
    "LLM-Pruner": lambda seed: LLMPruner(levels=LEVELS),
    "FLAP": lambda seed: FLAP(levels=LEVELS),
    "Wanda-sp": lambda seed: WandaSP(levels=LEVELS),
    "ShortGPT": lambda seed: ShortGPT(levels=LEVELS),
    "magnitude": lambda seed: Magnitude(levels=LEVELS),
    "random": lambda seed: Random(levels=LEVELS, seed=seed),
}
OTHERS = tuple(name for name in PRUNERS if not name.startswith("GISP"))
Figures = Mapping[str, NDArray[np.float64]]  # (seeds, L) by method


def run(quick: bool, out: Path) -> list[Claim]:
    """Three seeds; only Shakespeare with ``quick``."""
    found = claims("Shakespeare", language(shakespeare, "Shakespeare", out))
    if not quick:
        found += claims("WikiText-2", language(wikitext, "WikiText-2", out))
    return [*found, decisions(out)]


def shakespeare(seed: int) -> CausalLM:
    source = text(SHAKESPEARE)
    letters = "".join(sorted(set("".join(source.read().texts))))
    return CausalLM(texts=source, model=MODEL, tokenizer=Characters(letters), length=96, test_limit=400, seed=seed)


def wikitext(seed: int) -> CausalLM:
    sources = {path.stem: text(path) for path in WIKITEXT}
    return CausalLM(texts=sources, model=MODEL, tokenizer=Bytes(), length=96, test_limit=400, seed=seed)


def language(task_of: Callable[[int], CausalLM], name: str, out: Path) -> Figures:
    """Held-out perplexity of every method at every level."""
    tables = [of_one_seed(task_of(seed), seed, out) for seed in SEEDS]
    figures = {method: np.array([table[method] for table in tables]) for method in PRUNERS}
    rows = [[method, *(f"{value:.2f}" for value in values.mean(0))] for method, values in figures.items()]
    print(aligned([f"{name}, perplexity", *(f"{level:.0%}" for level in LEVELS)], rows), end="\n\n", flush=True)
    draw(figures, name, out / f"{name.lower()}.png")
    return figures


def of_one_seed(task: CausalLM, seed: int, out: Path) -> Mapping[str, list[float]]:
    model = trained(task, seed, kept=out / "models")
    batches, held = calibration(task.data().train, 64, seed), task.data().test
    smap, layers = task.structures(model), language_structures(model, task.length, units=("layer",))
    seen = moments(model, smap, task.losses, batches)
    found = {}
    for name, pruner in PRUNERS.items():
        own = layers if name == "ShortGPT" else smap
        trajectory = pruner(seed).trajectory(model, own, task.losses, batches)
        found[name] = []
        for level in LEVELS:
            small = trajectory.at(level).sliced(model, own)
            if name == "FLAP":
                compensate(small, model, own, trajectory.at(level), seen)
            found[name].append(perplexity(task, small, held))
        print(f"seed {seed}  {name:30s}" + "  ".join(f"{p:7.3f}" for p in found[name]), flush=True)
    return found


def claims(name: str, figures: Figures) -> list[Claim]:
    gisp, once = figures["GISP"], figures["one-shot"]
    found = []
    for level in (0.4, 0.5):
        at = LEVELS.index(level)
        best = np.min([figures[method][:, at] for method in OTHERS], axis=0)
        found.append(
            Claim.measured(f"{name}: perplexity of the best other method / GISP at {level:.0%}", (best / gisp[:, at]).tolist(), bar="> 1 x")
        )
    at = LEVELS.index(0.5)
    excess = (gisp[:, at] - gisp[:, 0]) / (once[:, at] - once[:, 0])
    found.append(Claim.measured(f"{name}: excess perplexity at 50 %, GISP / one-shot", excess.tolist(), bar="<= 0.85 x"))
    means = [figures[method][:, at].mean() for method in ("GISP", "one-shot", "magnitude", "random")]
    order = sum(a < b for a, b in pairwise(means))
    note = "GISP < one-shot < magnitude < random, mean perplexity"
    return [*found, Claim(name=f"{name}: order at 50 %", value=order, spread=nan, bar=">= 3 of 3", seeds=len(SEEDS), note=note)]


def decisions(out: Path) -> Claim:
    """What a decision task gains from its own objective at 60 %."""
    rows, gains = [], []
    for seed in SEEDS:
        task = sums_task(seed)
        model = trained(task, seed, kept=out / "models")
        smap = task.structures(model)
        window, exam = choices(task, 128, 10 + seed), choices(task, 400, 100 + seed)
        texts = [
            Batch(inputs, targets) for inputs, targets in zip(window.inputs[:, 0].split(32), window.targets[:, 0].split(32), strict=True)
        ]
        asked = [Choices(*parts) for parts in zip(window.inputs.split(32), window.targets.split(32), strict=True)]
        pruner = GISP(levels=(0.6,), steps=20)
        for_margin = pruner.trajectory(model, smap, Margin(task), asked).at(0.6)
        for_text = pruner.trajectory(model, smap, task.losses, texts).at(0.6)
        right = [share_right(task, s.sliced(model, smap), exam) for s in (for_margin, for_text)]
        rows.append([str(seed), f"{share_right(task, model, exam):.3f}", *(f"{r:.3f}" for r in right)])
        gains.append(right[0] - right[1])
    print(aligned(["which sum is right, 60 %", "dense", "margin", "perplexity"], rows), flush=True)
    return Claim.measured("decision task at 60 %: accuracy pruned for its margin - for perplexity", gains, bar="> 0")


def choices(task: Reasoning, number: int, seed: int) -> Choices:
    """Questions with the right working and three whose last sum is wrong."""
    rng = rng_for(seed, "choices")
    found = []
    for _ in range(number):
        a, b, c = rng.integers(1, 10, 3).tolist()
        right = a + b + c
        wrong = [w for w in rng.permutation(np.arange(right - 4, right + 5)).tolist() if w > 0 and w != right][:3]
        found.append(task.batch([f"{a}+{b}+{c}"] * 4, [f"{a}+{b}={a + b};{a + b}+{c}={w}#{w}" for w in (right, *wrong)]))
    return Choices(torch.stack([b.inputs for b in found]), torch.stack([b.targets for b in found]))


def share_right(task: Reasoning, model: nn.Module, exam: Choices) -> float:
    parts = zip(exam.inputs.split(100), exam.targets.split(100), strict=True)
    return float(torch.cat([chosen_rightly(task, model, Choices(*part)) for part in parts]).mean())


@styled
def draw(figures: Figures, name: str, path: Path) -> None:
    drawn = figure(WIDE, 4.2)
    axes = drawn.subplots()
    for (method, values), colour, marker in zip(figures.items(), (*SERIES, "black", "tan"), (*MARKERS, ".", "*"), strict=True):
        axes.plot(LEVELS, values.mean(0), label=method, color=colour, marker=marker, markersize=4)
    dense = figures["GISP"][:, 0].mean()
    axes.set(title=f"{name}: perplexity without any training after pruning", xlabel="sparsity", ylabel="perplexity", yscale="log")
    axes.set_ylim(dense * 0.95, dense * 8)
    axes.legend(loc="upper left", fontsize=7)
    save_figure(drawn, path)


if __name__ == "__main__":
    sys.exit(main("gisp_language", run))
