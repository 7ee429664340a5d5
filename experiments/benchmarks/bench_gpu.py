"""On one CUDA device: clients a second in the loop and in lanes of width 1 to 64, for a perceptron, a small CNN and ResNet-18 with group norms.

Measures and claims nothing: the rule for widths on CUDA (:func:`fedsim.lanes.lanes_for`) has no measurement behind it until this has run. The widths take
turns in every repetition; ratios to the loop on the same device are medians with least and most. Every width must end with the loop's test loss to 0.1 %.
``python -m experiments.benchmarks.bench_gpu [--quick]``; without a CUDA device it is skipped.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from experiments.peers.job import JOBS, Job, Pictures, Vector
from experiments.peers.race import race, table
from experiments.study import Claim, Skipped, main
from fedsim.randomness import torch_seeded
from fedsim.runtime import SerialExecutor

WIDTHS = (4, 8, 16, 32, 64)
MLP, TINY, LARGE, _ = JOBS


class Residual(nn.Module):
    """Two 3 x 3 convolutions with group norms, and the way around them."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(8, after)
        around = [nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(8, after)] if stride > 1 or before != after else []
        self.around = nn.Sequential(*around)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first_norm(self.first(inputs)).relu()
        out: Tensor = (self.second_norm(self.second(hidden)) + self.around(inputs)).relu()
        return out


@dataclass(frozen=True, kw_only=True)
class ResidualPictures(Pictures):
    """ResNet-18 for pictures of 32 pixels, group norms in place of batch norms."""

    def build(self, seed: int) -> nn.Module:
        with torch_seeded(seed, "model"):
            layers: list[nn.Module] = [nn.Conv2d(self.channels, 64, 3, padding=1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
            width = 64
            for after, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
                layers.append(Residual(width, after, stride))
                width = after
            return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


@dataclass(frozen=True, kw_only=True)
class ResidualJob(Job):
    """A job on :class:`ResidualPictures`."""

    @property
    def task(self) -> Pictures:  # type: ignore[override]
        return ResidualPictures(model="cnn", num=self.clients * self.examples, side=self.side, channels=self.channels)


RESIDUAL = ResidualJob(
    name="ResNet-18, group norms", model="cnn", clients=50, cohort=32, examples=100, steps=5, side=32, channels=3, rounds=3, rate=0.02
)


def run(quick: bool, out: Path) -> list[Claim]:
    """3 repetitions with ``quick``, else 9. Raises ``Skipped`` without a CUDA device."""
    if not torch.cuda.is_available():
        raise Skipped("bench_gpu needs a CUDA device and a torch built for it; torch.cuda.is_available() is False here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n", flush=True)
    jobs = (replace(MLP, cohort=200), replace(TINY, cohort=128), replace(LARGE, cohort=40), RESIDUAL)
    for job in jobs:
        engines = {"loop": _on_gpu(job, 1), **{f"{width} lanes": _on_gpu(job, width) for width in WIDTHS if width <= 2 * job.cohort}}
        found = race(job, engines, 3 if quick else 9, tolerance=1e-3)
        print(table(job, found), flush=True)
        rows = {name: median(own.seconds) for name, own in found.items()}
        print(f"{job.name}: fastest with {min(rows, key=lambda name: rows[name])}; peak GPU memory {_peak():.0f} MB\n", flush=True)
    return []


def _on_gpu(job: Job, lanes: int) -> Callable[[], tuple[list[float], Vector]]:
    def run() -> tuple[list[float], Vector]:
        training = job.training(SerialExecutor(), lanes, device="cuda")
        state, seconds = training.init(), []
        for _ in range(max(3, min(job.rounds, 6))):
            start = time.perf_counter()
            state, _ = training.step(state)  # ends with a copy to the host, so the device is done
            seconds.append(time.perf_counter() - start)
        return seconds, state.params

    return run


def _peak() -> float:
    """Peak memory on the device since the last call, in MB."""
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    sys.exit(main("bench_gpu", run))
