"""Work timed so that a busy machine slows all that is compared alike."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SECONDS, FEWEST, MOST = 3.0, 13, 201  # of timing one reference, and how many repetitions that may be


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def timed(reference: nn.Module, modules: Sequence[nn.Module], inputs: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds of forward passes of ``reference`` and of each module, both (modules, repetitions), after a warm-up.

    Each pass of a module stands next to one of the reference, before it and after it in turn. Seconds are those this thread computes: on an
    idle core they are elapsed seconds, on a shared one they leave out the others' turns. The
    reference runs more often, so a small one is likelier to be found in the cache: against the modules, if at all.
    """
    passes = _pairs(reference, modules, inputs, first=True)
    repetitions = int(np.clip(SECONDS / passes.sum(), FEWEST, MOST))
    pairs = np.stack([_pairs(reference, modules, inputs, first=bool(r % 2)) for r in range(repetitions)], axis=-1)
    return pairs[0], pairs[1]


def alternating(runs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of every run, in turn, after one of each to warm up: those this thread computes, or elapsed ones where there is a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for repetition in range(repeats + 1):
        for name, work in runs.items():
            start = clock()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(clock() - start)
    return seconds


def _pairs(reference: nn.Module, modules: Sequence[nn.Module], inputs: Tensor, *, first: bool) -> NDArray[np.float64]:
    """Seconds (2, modules) of the reference and of every module, the reference ``first`` or second."""
    seconds = np.empty((2, len(modules)))
    for column, module in enumerate(modules):
        for row in (0, 1) if first else (1, 0):
            seconds[row, column] = _forward((reference, module)[row], inputs)
    return seconds


def _forward(module: nn.Module, inputs: Tensor) -> float:
    start = time.thread_time()
    module(inputs)
    return time.thread_time() - start


def flops_of(module: nn.Module, inputs: Tensor) -> int:
    """FLOPs of one forward pass, as torch counts what it executes."""
    with FlopCounterMode(display=False) as counter:
        module(inputs)
    return int(counter.get_total_flops())
