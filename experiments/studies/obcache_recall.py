"""What a language model recalls from a cache that was cut down before, or after, it knew the questions: scores and hosts of OBCache.

A text of 121 tokens holds 8 facts among fillers; a fact is one token that says a key and its value. Then come 8 questions, tokens that name a
key, answered by its value. A Llama of two layers learns this from scratch. *Query-agnostic*: the cache of the text is cut down by
its last 16 tokens, all the same to any question. *Query-aware*: the questions stand at its end and are the window.
"""

# B texts, L tokens of a text, Q questions

import sys
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from experiments.study import Claim, main, save_figure
from fedsim.llm.decoder import Decoder, built
from fedsim.llm.eviction import H2O, TOVA, AdaKV, Host, SnapKV, StreamingLLM
from fedsim.llm.obcache import OBCache
from fedsim.llm.token_scores import Attention, AttentionTimesValueNorm, Evict, Joint, Key, RandomScore, TokenScore, Value
from fedsim.randomness import rng_for, torch_seeded
from fedsim.runs.style import MARKERS, SERIES, WIDE, figure, styled
from fedsim.runs.text import aligned

KEYS, VALUES, FILLERS, FACTS, LENGTH, WINDOW = 10, 10, 32, 8, 121, 16
BEGIN, FILLER, QUESTION = 0, 1, 1 + FILLERS
ANSWER, FACT = QUESTION + KEYS, QUESTION + KEYS + VALUES
VOCABULARY = FACT + KEYS * VALUES
MODEL = Decoder(layers=2, width=64, heads=4, kv_heads=2, hidden=176, tied=False)
CURRICULUM = (32, 64, LENGTH)
SEEDS, BUDGETS, AWARE = (0, 1, 2), (24, 32, 48), 20
SCORES: Mapping[str, TokenScore] = {
    "random": RandomScore(1),
    "attention": Attention(),
    "attention x norm": AttentionTimesValueNorm(),
    "value": Value(),
    "key": Key(),
    "joint": Joint(),
    "evict": Evict(),
}
OUTPUT_AWARE = ("value", "key", "joint", "evict")
SNAPKV = SnapKV(window=WINDOW, pool=1)
OTHERS: Mapping[str, Host] = {"AdaKV": AdaKV(window=WINDOW, pool=1), "H2O": H2O(recent=WINDOW), "TOVA": TOVA()}
Recall = dict[str, dict[int, list[float]]]  # by score or host, budget and seed


class Exam(NamedTuple):
    """``texts`` (B, L), ``questions`` and ``answers`` (B, Q)."""

    texts: Tensor
    questions: Tensor
    answers: Tensor


def run(quick: bool, out: Path) -> list[Claim]:
    """Three seeds; hosts other than SnapKV only without ``quick``."""
    models = [trained(seed) for seed in SEEDS]
    exams = [exam(144, LENGTH, seed, "exam") for seed in SEEDS]
    agnostic = {name: recalled(models, exams, score, SNAPKV) for name, score in SCORES.items()}
    agnostic["StreamingLLM"] = recalled(models, exams, Attention(), StreamingLLM())
    show("SnapKV, query-agnostic", agnostic)
    aware = {name: aware_recall(models, exams, score) for name, score in SCORES.items()}
    show("SnapKV, query-aware", aware)
    for name, host in {} if quick else OTHERS.items():
        show(f"{name}, query-agnostic", {score: recalled(models, exams, SCORES[score], host) for score in ("attention", *OUTPUT_AWARE)})
    draw(agnostic, out / "obcache_recall.png")
    return claims(agnostic, aware)


def exam(number: int, length: int, seed: int, *use: object) -> Exam:
    """Texts of ``length`` tokens that begin alike; no key stands in two facts of a text, and each is asked for once."""
    rng = rng_for(seed, "recall", *use)
    keys = rng.permuted(np.tile(np.arange(KEYS), (number, 1)), axis=1)[:, :FACTS]
    values = rng.integers(VALUES, size=(number, FACTS))
    texts = rng.integers(FILLER, FILLER + FILLERS, (number, length))
    places = 1 + rng.permuted(np.tile(np.arange(length - 1), (number, 1)), axis=1)[:, :FACTS]
    np.put_along_axis(texts, places, FACT + keys * VALUES + values, axis=1)
    texts[:, 0] = BEGIN
    order = rng.permuted(np.tile(np.arange(FACTS), (number, 1)), axis=1)
    asked, answers = (np.take_along_axis(x, order, axis=1) for x in (keys, values))
    return Exam(*(torch.from_numpy(x) for x in (texts, QUESTION + asked, ANSWER + answers)))


def trained(seed: int) -> nn.Module:
    """A model that answers 97 % right at each length of the curriculum, the last that of the exam; texts are never repeated."""
    with torch_seeded(seed, "recall"):
        model = built(MODEL, VOCABULARY)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    step = 0
    for length in CURRICULUM:
        right = 0.0
        while right < 0.97 and step < 6000:
            step += 1
            batch = exam(64, length, seed, "training", step)
            logits = model(torch.cat([batch.texts, batch.questions], 1), logits_to_keep=FACTS).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            right = 0.9 * right + 0.1 * share_right(logits, batch.answers)
        print(f"seed {seed}: {length:4d} tokens, {right:.3f} right after {step} steps", flush=True)
    return model.eval()


def recalled(models: Sequence[nn.Module], exams: Sequence[Exam], score: TokenScore, host: Host) -> dict[int, list[float]]:
    """Share of right answers by budget and seed; the text is cut down before the questions are known."""
    return {
        budget: [
            answered(m, e.texts, e, OBCache(score=score, host=host, budget=budget, sink=1)) for m, e in zip(models, exams, strict=True)
        ]
        for budget in BUDGETS
    }


def aware_recall(models: Sequence[nn.Module], exams: Sequence[Exam], score: TokenScore) -> dict[int, list[float]]:
    """The same where the questions end the text and decide what stays of it."""
    method = OBCache(score=score, host=SnapKV(window=FACTS, pool=1), budget=AWARE, sink=1)
    return {AWARE: [answered(m, torch.cat([e.texts, e.questions], 1), e, method) for m, e in zip(models, exams, strict=True)]}


def answered(model: nn.Module, texts: Tensor, asked: Exam, method: OBCache) -> float:
    cache = DynamicCache()
    with torch.no_grad(), method.applied(model):
        model(texts, cache=cache, use_cache=True)
        logits = model(asked.questions, cache=cache, use_cache=True).logits
    return share_right(logits, asked.answers)


def share_right(logits: Tensor, answers: Tensor) -> float:
    return float((logits.argmax(-1) == answers).double().mean())


def show(title: str, recall: Recall) -> None:
    budgets = list(next(iter(recall.values())))
    rows = [[name, *(" ".join(f"{share:.2f}" for share in found[b]) for b in budgets)] for name, found in recall.items()]
    print(aligned([title, *(f"{b} of {LENGTH} tokens" for b in budgets)], rows), end="\n\n", flush=True)


def claims(agnostic: Recall, aware: Recall) -> list[Claim]:
    gains = {name: np.subtract(agnostic[name][24], agnostic["attention"][24]).tolist() for name in OUTPUT_AWARE}
    note = "where the window is the questions the score hardly matters, but key, a first-order score, loses some"
    return [
        Claim(
            name="query-agnostic, 24 tokens: recall by an output-aware score - by attention, least of scores and seeds",
            value=min(map(min, gains.values())),
            spread=nan,
            bar=">= 0.05",
            seeds=len(SEEDS),
            note=", ".join(f"{name} {min(found):.3f}" for name, found in gains.items()),
        ),
        Claim.measured("query-agnostic, 24 tokens: recall by evict - by attention", gains["evict"], bar=">= 0.05"),
        Claim(
            name="query-aware, 20 tokens: recall by attention, value, joint and evict, least of scores and seeds",
            value=min(share for name in ("attention", "value", "joint", "evict") for share in aware[name][AWARE]),
            spread=nan,
            bar=">= 0.99",
            seeds=len(SEEDS),
            note=note,
        ),
    ]


@styled
def draw(recall: Recall, path: Path) -> None:
    drawn = figure(WIDE, 3.6)
    axes = drawn.subplots()
    for (name, found), colour, marker in zip(recall.items(), (*SERIES, "black"), (*MARKERS, "."), strict=True):
        axes.plot(BUDGETS, [np.mean(found[b]) for b in BUDGETS], label=name, color=colour, marker=marker, markersize=4)
    axes.set(
        title="Recall from a cache cut down before the questions", xlabel=f"tokens kept of {LENGTH}", ylabel="right answers", ylim=(0, 1)
    )
    axes.set_xticks(BUDGETS)
    axes.legend(fontsize=7)
    save_figure(drawn, path)


if __name__ == "__main__":
    sys.exit(main("obcache_recall", run))
