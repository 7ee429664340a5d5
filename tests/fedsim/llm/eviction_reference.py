"""Attention of a model without a cache, in which queries do not see what was evicted before they came: the slow law of every host.

Scores of single removals are found by removing, choices by sorting lists. Queries of all passes are computed anew at each step.
"""

import math
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "tests_eviction_reference"


class Reference:
    """Greedy tokens, logits (B, n, V) and kept positions {layer: [row][head]} of ``model`` under a host's rule."""

    def __init__(self, host, budget, sink, decode):
        self.host, self.budget, self.sink, self.decode = host, budget, sink, decode
        self.hidden, self.sums = {}, {}  # by layer: [(first query that does not see, (B, G, T) flags)], running scores

    def write(self, model, prompt, many):
        tokens, logits, self.passes = prompt, [], [prompt.shape[1]]
        with torch.no_grad(), reference_attention(model, self):
            for _ in range(many):
                found = model(tokens, use_cache=False).logits[:, -1]
                logits.append(found)
                tokens = torch.cat([tokens, found.argmax(-1, keepdim=True)], 1)
                self.passes.append(1)
        return tokens, torch.stack(logits, 1)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **settings):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        B, H, T, _ = query.shape
        G = key.shape[1]
        layer = module.layer_idx
        seen = torch.ones(T, T, dtype=torch.bool).tril().expand(B, G, T, T).clone()
        for start, evicted in self.hidden.get(layer, []):
            seen[:, :, start:, : evicted.shape[-1]] &= ~evicted[:, :, None]
        outputs = [
            torch.softmax((scale * query[:, h] @ key[:, h * G // H].mT).masked_fill(~seen[:, h * G // H], -torch.inf), -1)
            @ value[:, h * G // H]
            for h in range(H)
        ]
        self.decide(layer, scale, query, key, value, seen)
        return torch.stack(outputs, 2), None

    def decide(self, layer, scale, query, key, value, seen):
        many = self.passes[-1]
        B, H, T, _ = query.shape
        G = key.shape[1]
        window = many if self.host.window is None else min(self.host.window, many)
        scores = torch.zeros(B, G, T, dtype=query.dtype)
        for h in range(H) if window else ():
            g = h * G // H
            logits = (scale * query[:, h, -window:] @ key[:, g].mT).masked_fill(~seen[:, g, -window:], -torch.inf)
            whole = torch.softmax(logits, -1) @ value[:, g]
            without = logits.unsqueeze(1).masked_fill(torch.eye(T, dtype=torch.bool)[:, None], -torch.inf)  # (B, T, window, T)
            left = torch.softmax(without, -1) @ value[:, g, None]
            move = (left - whole.unsqueeze(1)).square().sum(-1)
            scores[:, g] += torch.where(without.isinf().all(-1), 0, move).sum(-1)
        if self.host.accumulates:
            old = self.sums.get(layer)
            if old is not None:
                scores[:, :, : old.shape[-1]] += old
            self.sums[layer] = scores
        held = seen[:, :, -1]
        if held[0].sum() <= self.budget * G or (many == 1 and not self.decode):
            return
        kept = torch.zeros_like(held)
        for b in range(B):
            for g, t in self.chosen(scores[b], held[b]):
                kept[b, g, t] = True
        self.hidden.setdefault(layer, []).append((T, held & ~kept))

    def chosen(self, scores, held):
        G, T = held.shape
        worth = {}
        for g in range(G):
            places = [t for t in range(T) if held[g, t]]
            old = [t for t in places if t < T - self.host.recent]
            for i, t in enumerate(old):
                reach = self.host.pool // 2
                worth[g, t] = max(float(scores[g, s]) for s in old[max(i - reach, 0) : i + reach + 1])
            worth.update({(g, t): math.inf for t in places if t < self.sink or t >= T - self.host.recent})
        best = sorted(worth, key=lambda place: (worth[place], place[1], place[0]), reverse=True)
        if self.host.floor is None:
            return [place for g in range(G) for place in [p for p in best if p[0] == g][: self.budget]]
        own = [place for g in range(G) for place in [p for p in best if p[0] == g][: int(self.host.floor * self.budget)]]
        return (own + [place for place in best if place not in own])[: self.budget * G]


_CURRENT = []


@contextmanager
def reference_attention(model, reference):
    AttentionInterface.register(NAME, lambda *args, **settings: _CURRENT[-1](*args, **settings))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    _CURRENT.append(reference)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _CURRENT.pop()
