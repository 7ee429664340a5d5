"""Batched sampling from a causal language model with a key-value cache; what is written depends on the seed, the prompt and its id.

Prompts of like length share a batch, padded at the left; rows that ended leave it. Each id draws with coins of its own, so batches
and their order move a trace only where rounding moves a probability across a coin.
"""

# B batch, L length of the longest prompt, V vocabulary

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fedsim.llm.families import check_positions
from fedsim.pruning.tracing import evaluating
from fedsim.randomness import uniforms

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """Tokens (n,) that a model wrote, its end included where it ``finished``."""

    tokens: Ints
    finished: bool


def generate(
    model: nn.Module,
    prompts: Sequence[ArrayLike],
    *,
    end: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    index: int = 0,
    ids: ArrayLike | None = None,
    batch: int = 64,
) -> list[Trace]:
    """What ``model``, a Hugging Face causal language model, writes after each of ``prompts`` (n,), until ``end`` or ``max_new_tokens``.

    ``temperature=0`` takes the most probable token; else tokens are drawn from the tempered law, cut to the smallest set of
    probability ``top_p``. The coin of a prompt for its t-th token is a function of (``seed``, id, ``index``, t); ``ids`` (n,), whole numbers
    from 0, are the prompts' places unless given. The model is left as it was. Raises ``ValueError`` for fields out of range, for texts that
    could outgrow learned positions and, with its number, for an empty prompt.
    """
    check_sampling(temperature, top_p)
    check_count("max_new_tokens", max_new_tokens)
    check_count("batch", batch)
    found = [np.asarray(p, np.int64) for p in prompts]
    numbers = np.arange(len(found)) if ids is None else np.asarray(ids, np.int64)
    if numbers.shape != (len(found),):
        raise ValueError(f"ids must hold one number for each of {len(found)} prompts, got shape {numbers.shape}")
    for number, prompt in enumerate(found):
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError(f"prompt {number} must hold at least one token, got shape {prompt.shape}")
    longest = max(map(len, found), default=0)
    check_positions(model, longest + max_new_tokens - 1, f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens}")
    order = np.argsort([-len(p) for p in found], kind="stable")
    traces: dict[int, Trace] = {}
    with torch.no_grad(), evaluating(model), _caching(model):
        for low in range(0, len(order), batch):
            members = order[low : low + batch]
            coins = uniforms(seed, "generate", numbers[members], index, max_new_tokens) if temperature else None
            writer = _Writer(model, end, temperature, top_p, max_new_tokens)
            traces.update(zip(members.tolist(), writer.write([found[i] for i in members], coins), strict=True))
    return [traces[i] for i in range(len(found))]


class _Writer:
    def __init__(self, model: nn.Module, end: int, temperature: float, top_p: float, most: int):
        self.model, self.end, self.temperature, self.top_p, self.most = model, end, temperature, top_p, most
        self.device = next(model.parameters()).device
        known = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.positions = "position_ids" in known

    def write(self, prompts: Sequence[Ints], coins: NDArray[np.float64] | None) -> list[Trace]:
        tokens, mask = _left_padded(prompts, self.end, self.device)
        width, rows = tokens.shape[1], np.arange(len(prompts))
        mask = torch.cat([mask, mask.new_ones(len(prompts), self.most)], dim=1)
        written = np.full((len(prompts), self.most), -1, np.int64)
        cache = None
        for step in range(self.most):
            logits, cache = self._forward(tokens, mask[:, : width + step], cache)
            new = self._chosen(logits, None if coins is None else coins[rows, step])
            written[rows, step] = new.cpu().numpy()
            going = new != self.end
            if not bool(going.any()):
                break
            if not bool(going.all()):
                rows = rows[going.cpu().numpy()]
                mask, new = mask[going], new[going]
                _keep(cache, going)
            tokens = new[:, None]
        return [self._trace(row[row >= 0]) for row in written]

    def _forward(self, tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits (B, V) after the last of ``tokens``."""
        settings: dict[str, Any] = {"attention_mask": mask, "use_cache": True, self.cache_name: cache}
        if self.positions:
            settings["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.model(tokens, logits_to_keep=1, **settings)
        return output.logits[:, -1].float(), getattr(output, self.cache_name)

    def _chosen(self, logits: Tensor, coins: NDArray[np.float64] | None) -> Tensor:
        """Tokens (B,): by inversion of the distribution function, tokens in falling order of probability."""
        if coins is None:
            return logits.argmax(-1)
        probabilities, order = torch.softmax(logits.double() / self.temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
        cumulative = probabilities.cumsum(-1)
        inside = (cumulative - probabilities) < self.top_p
        within = torch.where(inside, cumulative, -torch.inf).amax(-1, keepdim=True)
        target = torch.from_numpy(coins).to(logits.device)[:, None] * within
        place = (cumulative <= target).sum(-1, keepdim=True)
        return order.gather(1, torch.minimum(place, inside.sum(-1, keepdim=True) - 1))[:, 0]

    def _trace(self, tokens: Ints) -> Trace:
        return Trace(tokens, bool(tokens[-1] == self.end))


def _left_padded(prompts: Sequence[Ints], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask (B, L)."""
    width = max(len(p) for p in prompts)
    tokens, mask = np.full((len(prompts), width), pad, np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def _keep(cache: Any, going: Tensor) -> None:
    """Only the rows that go on stay in the cache."""
    rows = torch.nonzero(going)[:, 0]
    for layer in cache.layers:
        layer.batch_select_indices(rows)


@contextmanager
def _caching(model: nn.Module) -> Any:
    """The model's cache on inside the block."""
    config: Any = model.config
    before = config.use_cache
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = before


def check_count(name: str, value: int) -> None:
    """``ValueError`` unless ``value`` is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


def check_sampling(temperature: float, top_p: float) -> None:
    """``ValueError`` for a law that nothing can be drawn from."""
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p!r}")
