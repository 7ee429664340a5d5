"""Simulated time: how long devices compute and links carry, from FLOPs and bytes. Never a sleep, never a wall clock."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def forward_flops(model: nn.Module, example: Tensor) -> int:
    """FLOPs of one example's forward pass (a multiply-add counts two); ``example`` is a batch of one, (1, ...)."""
    if len(example) != 1:
        raise ValueError(f"example must be a batch of one, got {len(example)} examples")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _Counter() as counter:  # type: ignore[no-untyped-call]
            functional_call(model, {name: p.detach() for name, p in model.named_parameters()}, (example,))
    finally:
        model.train(was_training)
    return int(counter.flops)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of what is computed inside, by torch's own formulas. Torch's own counter would import its compiler, which takes a second."""

    flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket) or _MORE.get(str(func._overloadpacket))
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        return result


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Products of queries (B, H, L, d) and keys, and of attention and values, for every pair of positions."""
    batch, heads, length = query.shape[:3]
    return 2 * batch * heads * length * key.shape[2] * (query.shape[3] + value.shape[3])


_MORE = {"aten._scaled_dot_product_flash_attention_for_cpu": _attention_flops}  # what torch's own registry lacks


def step_flops(forward: int, batch_size: int) -> int:
    """FLOPs of one local step: the backward pass costs two forward passes."""
    return 3 * forward * batch_size


def round_seconds(points: Sequence[tuple[int, ...]], step_seconds: ArrayLike, up_seconds: ArrayLike, down_seconds: ArrayLike) -> float:
    """Duration of a round in which client i uploads after the local steps ``points[i]``; an empty list sits out.

    Every client downloads, computes up to its next point and uploads; a merge waits for the last of the clients due
    there, who then download its result. The result of the round's last point travels with the next round's start.
    Seconds per step, upload and download are (n,).

    >>> round_seconds([(1, 2), (2,)], [1.0, 3.0], [0.5, 0.5], [0.25, 0.25])
    6.75
    """
    step, up, down = (np.asarray(v, np.float64) for v in (step_seconds, up_seconds, down_seconds))
    ready, at = down.copy(), np.zeros(len(points), np.int64)
    merged = 0.0
    for point, due in by_point(points):
        merged = float((ready[due] + (point - at[due]) * step[due] + up[due]).max())
        ready[due], at[due] = merged + down[due], point
    return merged


def by_point(points: Sequence[tuple[int, ...]]) -> list[tuple[int, NDArray[np.int64]]]:
    """The round's synchronisation points in order, each with the positions (ascending) of the clients due there."""
    if len(set(points)) == 1:
        return [(point, np.arange(len(points))) for point in points[0]]
    due: dict[int, list[int]] = {}
    for position, own in enumerate(points):
        for point in own:
            due.setdefault(point, []).append(position)
    return [(point, np.array(due[point], np.int64)) for point in sorted(due)]
