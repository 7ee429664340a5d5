"""Pruning, sampling and serving language models: what cutting out, a bounded cache and probes gain, on GPUs too where there are any.

On a CPU, a Llama of 4 layers: seconds of one importance pass at 50 % and of a whole trajectory to 60 %, silenced over cut out; tokens a second of
64 sampled traces over ``generate``'s; a bounded cache's prefill, decoding and bytes. On CUDA also, for Llamas of 1 B and 8 B random
parameters in bf16: peak memory of a step over weights + one layer's gradients, seconds a step, decoding against the memory bandwidth, what
level 40 % gains over its share of FLOPs and bytes, a cache of 20 %, and Probe Pruning of 40 %.
"""

# B texts, T tokens of a context

import sys
import time
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.study import Claim, main
from experiments.timing import alternating, one_thread
from fedsim.llm.arithmetic import Arithmetic, characters
from fedsim.llm.causal_lm import LanguageTask
from fedsim.llm.decoder import Decoder
from fedsim.llm.eviction import SnapKV
from fedsim.llm.generation import generate
from fedsim.llm.kv_budget import kv_bytes_per_token
from fedsim.llm.obcache import OBCache
from fedsim.llm.objectives import Checkpointed
from fedsim.llm.probe_pruning import ProbePruning
from fedsim.llm.reasoning_task import Reasoning
from fedsim.pruning import GISP, FirstOrder, Random, Submodel
from fedsim.pruning.budgets import Flops, Memory
from fedsim.randomness import rng_for
from fedsim.tasks.base import Batch

WIDE = Decoder(layers=4, width=384, heads=8, kv_heads=4, hidden=1024)
SMALL = Decoder(architecture="qwen3", layers=4, width=128, heads=8, kv_heads=4, hidden=352)
BILLION = {
    "1 B": Decoder(layers=16, width=2048, heads=32, kv_heads=8, hidden=8192, dtype="bfloat16", tied=True),
    "8 B": Decoder(layers=32, width=4096, heads=32, kv_heads=8, hidden=14336, dtype="bfloat16", tied=False),
}
VOCABULARY = 32_000


def run(quick: bool, out: Path) -> list[Claim]:
    """Three repetitions with ``quick``, else nine; on CUDA one step of each size."""
    repeats = 3 if quick else 9
    with one_thread():
        task = _Runs(WIDE, 128, 2048)
        found = [*cut_out(repeats), sampling(repeats), *bounded("CPU", task.build(0).eval(), task.random(1, 0).inputs, 256, repeats)]
    if torch.cuda.is_available():
        for name, model in BILLION.items():
            found += on_cuda(name, model)
    else:
        print("no CUDA device: the figures of 1 B and 8 B parameters are not measured")
    return found


def cut_out(repeats: int) -> list[Claim]:
    """Silenced over cut out: one pass at half the model, and a whole trajectory."""
    task = _Runs(WIDE, 128, 128)
    model = task.build(0).eval()
    smap, batches = task.structures(model), [task.random(16, seed) for seed in range(2)]
    half = Random(levels=(0.5,)).trajectory(model, smap, task.losses, batches).at(0.5)
    both = {compact: FirstOrder(compact=compact) for compact in (False, True)}
    once = alternating({c: lambda m=m: m.scores(model, smap, task.losses, batches, half.kept) for c, m in both.items()}, repeats)
    whole = alternating(
        {c: lambda m=m: GISP(levels=(0.6,), steps=6, importance=m).trajectory(model, smap, task.losses, batches) for c, m in both.items()},
        max(2, repeats // 3),
    )
    return [
        _ratio("scores at 50 %, silenced / cut out", once[False], once[True], ">= 1.5 x"),
        _ratio("trajectory to 60 %, silenced / cut out", whole[False], whole[True], "> 1 x"),
    ]


def sampling(repeats: int) -> Claim:
    """Tokens a second of traces that end by themselves, over transformers' ``generate`` with the same padding."""
    task = Reasoning(problems=Arithmetic(number=200), model=SMALL, tokenizer=characters(), length=96)
    model, end = task.build(0).eval(), task.tokenizer.end
    prompts = [task.prompt(q) for q in task.problems.read().questions[:64]]
    width = max(len(p) for p in prompts)
    tokens, mask = np.full((64, width), task.tokenizer.pad), np.zeros((64, width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    settings: dict[str, Any] = {"max_new_tokens": 48, "do_sample": True, "temperature": 0.6, "use_cache": True}
    settings |= {"top_k": 0, "eos_token_id": end, "pad_token_id": task.tokenizer.pad, "attention_mask": torch.from_numpy(mask)}
    counts: dict[str, list[int]] = {"ours": [], "theirs": []}

    def ours() -> None:
        counts["ours"].append(sum(len(t.tokens) for t in generate(model, prompts, end=end, max_new_tokens=48, temperature=0.6)))

    def theirs() -> None:
        with torch.random.fork_rng(devices=[]):
            written = model.generate(torch.from_numpy(tokens), **settings)[:, width:]  # type: ignore[operator]
        counts["theirs"].append(int((written != task.tokenizer.pad).sum()))

    seconds = alternating({"ours": ours, "theirs": theirs}, repeats)
    rates = {name: [n / s for n, s in zip(counts[name][1:], seconds[name], strict=True)] for name in seconds}
    print(f"sampling 64 traces: {median(rates['ours']):.0f} tokens/s, transformers {median(rates['theirs']):.0f}")
    return _ratio("tokens a second, ours / transformers' generate", rates["ours"], rates["theirs"], ">= 1 x")


def on_cuda(name: str, decoder: Decoder) -> list[Claim]:
    """Memory, time and decoding of one size on the GPU."""
    task = _Runs(decoder, VOCABULARY, 256)
    with torch.device("cuda"):
        model = task.build(0).eval()
    smap, batches = task.structures(model), [task.random(4, seed, "cuda") for seed in range(4)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 4  # type: ignore[index, union-attr]
    method = FirstOrder(compact=False, gradient_bytes=layer)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    method.scores(model, smap, Checkpointed(task.losses), batches, np.ones(len(smap), np.bool_))
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    print(
        f"{name}: a step over {len(batches)} batches of 4 x 256 tokens takes {seconds:.1f} s, {peak / 2**30:.1f} GiB of {weights / 2**30:.1f} GiB of weights"
    )
    small = Random(levels=(0.4,)).trajectory(model, smap, task.losses, batches).at(0.4)
    return [
        Claim(
            name=f"{name}: peak memory / (weights + a layer's gradients)",
            value=peak / (weights + layer),
            spread=nan,
            bar="<= 1.2 x",
            seeds=1,
        ),
        decoding(name, model, task),
        *level_gain(name, model, small, smap),
        *bounded(name, model, task.random(4, 1, "cuda", 8192).inputs, 8192 // 5, 5),
        probed(name, model, [batch.inputs for batch in (task.random(20, seed, "cuda", 1024) for seed in range(2))]),
    ]


def decoding(name: str, model: nn.Module, task: "_Runs") -> Claim:
    """Bytes a decoding step must read over what the device can, 64 traces of 128 tokens."""
    smap = task.structures(model)
    none = np.zeros(len(smap.blocks), np.int64)
    prompts = [row.cpu().numpy()[:64] for row in task.random(64, 9).inputs]
    generate(model, prompts, end=VOCABULARY, max_new_tokens=4)
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate(model, prompts, end=VOCABULARY, max_new_tokens=128)
    torch.cuda.synchronize()
    step = (time.perf_counter() - start) / 128
    share = float(Memory(context=128, batch=64)(smap, none)) / step / _bandwidth()
    return Claim(name=f"{name}: sampling, share of the memory bandwidth", value=share, spread=nan, bar=">= 0.5", seeds=1)


def level_gain(name: str, model: nn.Module, small: Submodel, smap: Any) -> list[Claim]:
    """Dense over pruned time, as a share of the ratio of FLOPs (prefill) or bytes (decode)."""
    pruned = small.sliced(model, smap)
    none, removed = np.zeros(len(smap.blocks), np.int64), smap.removed_counts(small.kept)
    found = []
    for phase, shape in (("prefill", (8, 512)), ("decode", (8, 1))):
        tokens = torch.randint(0, VOCABULARY, shape, device="cuda")
        times = alternating({m: lambda m=m, tokens=tokens: _forward(m, tokens) for m in (model, pruned)}, 20)
        cost = Flops(tokens=512, batch=8) if phase == "prefill" else Memory()
        expected = float(cost(smap, none) / cost(smap, removed))
        gained = median(times[model]) / median(times[pruned])
        found.append(
            Claim(name=f"{name}: {phase} speed-up at 40 % / its ratio of cost", value=gained / expected, spread=nan, bar=">= 0.7", seeds=1)
        )
    return found


def bounded(name: str, model: nn.Module, tokens: torch.Tensor, budget: int, repeats: int) -> list[Claim]:
    """A context (B, T) read under a budget: its prefill and one decoding step, as shares of the whole cache's, and the bytes that stay."""
    rule, newest = OBCache(host=SnapKV(window=32), budget=budget), tokens[:, -1:]

    def prefill() -> Any:
        with torch.no_grad():
            return model(tokens, use_cache=True, logits_to_keep=1).cache

    def decode(cache: Any) -> Any:
        def once() -> None:
            with torch.no_grad():
                model(newest, cache=cache, use_cache=True)

        return once

    whole = prefill()
    with rule.applied(model) as session:
        cut = prefill()
        share = session.bytes_held / (len(tokens) * budget * kv_bytes_per_token(model))

    def prefill_under() -> None:
        with rule.applied(model):
            prefill()

    reading = alternating({"whole": prefill, "cut": prefill_under}, repeats)
    writing = alternating({"whole": decode(whole), "cut": decode(cut)}, 3 * repeats)
    shape = f"{tokens.shape[0]} x {tokens.shape[1]} tokens, budget {budget}"
    return [
        _ratio(
            f"{name}: prefill of {shape}, bounded / whole", reading["cut"], reading["whole"], "<= 1.1 x" if name == "CPU" else "<= 1.03 x"
        ),
        _ratio(f"{name}: decoding after {shape}, whole / bounded", writing["whole"], writing["cut"], "> 1 x"),
        Claim(name=f"{name}: bytes held / arithmetic, {shape}", value=share, spread=0.0, bar="<= 1.05 x", seeds=1),
    ]


def probed(name: str, model: nn.Module, batches: list[torch.Tensor]) -> Claim:
    """Dense over pruned seconds of a batch at 40 %, probes included."""
    rule = ProbePruning(sparsity=0.4, multiple=64)
    with rule.applied(model, rule.calibrate(model, batches[:1])):
        runs = {"PP": lambda: _forward(model, batches[1])}
        pruned = alternating(runs, 5)["PP"]
    dense = alternating({"dense": lambda: _forward(model, batches[1])}, 5)["dense"]
    return _ratio(f"{name}: Probe Pruning of 40 %, dense / pruned seconds", dense, pruned, ">= 1.3 x")


class _Runs(LanguageTask):
    """Random tokens for a model: what time and memory depend on."""

    def __init__(self, model: Decoder, vocabulary: int, length: int):
        self.model, self.length = model, length
        self.tokenizer: Any = type("Tokens", (), {"vocabulary": vocabulary, "end": vocabulary - 1, "pad": vocabulary - 1})

    def random(self, number: int, seed: int, device: str = "cpu", length: int | None = None) -> Batch:
        shape = number, (length or self.length) + 1
        tokens = torch.from_numpy(rng_for(seed, "bench").integers(0, self.tokenizer.vocabulary, shape)).to(device)
        return Batch(tokens[:, :-1], tokens[:, 1:])


def _ratio(name: str, over: list[float], under: list[float], bar: str) -> Claim:
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    note = f"median of {len(ratios)} paired ratios, {min(ratios):.2f} to {max(ratios):.2f}"
    return Claim(name=name, value=median(ratios), spread=(max(ratios) - min(ratios)) / 2, bar=bar, seeds=1, note=note)


def _forward(model: nn.Module, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(tokens)


def _bandwidth() -> float:
    """Bytes a second the device reads and writes when it copies a gibibyte."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = alternating({"copy": lambda: target.copy_(source)}, 10)["copy"]
    return float(2 * 2**30 / median(seconds))


if __name__ == "__main__":
    sys.exit(main("bench_language", run))
