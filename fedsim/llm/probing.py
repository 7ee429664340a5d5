"""What Probe Pruning decides with: which part of a batch probes, how probe and history fuse, what a channel is worth (arXiv:2502.15618).

Pure functions of tensors, in float32 or better. Exports: FixedRatio, FLAPImportance, FullBatch, HistoryOnly, ImportanceScaled, PPImportance,
ProbeOnly, RandomProbe, ResidualImportance, WandaImportance, mean_squares, probe_size.
"""

# B samples, L tokens, C input channels of an output projection, D hidden size, U units (heads or channels) of w channels each

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.randomness import rng_for

EPSILON = 1e-6  # where neither probe nor history saw anything
FEW_TOKENS = 10  # a probe this short always reads the first token


class ProbeSelection(Protocol):
    """Chooses the probe."""

    def select(self, norms: Tensor, samples: int, tokens: int, number: int) -> tuple[Tensor, Tensor]:
        """Rows (n,) and columns (m,), ascending, of ``norms`` (B, L), the Euclidean norms of the residual stream, 0 at padding.

        ``number`` counts the choices a session has made.
        """
        ...


@dataclass(frozen=True)
class ResidualImportance:
    """The tokens, then the samples on those tokens, with the largest norms on the residual stream."""

    def select(self, norms: Tensor, samples: int, tokens: int, number: int) -> tuple[Tensor, Tensor]:
        columns = _largest(norms.norm(dim=0), tokens)
        if tokens <= FEW_TOKENS and bool((norms[:, 0] > 0).all()):
            columns[0] = 0
        return _largest(norms[:, columns].norm(dim=1), samples), columns


@dataclass(frozen=True)
class RandomProbe:
    """As many samples and tokens, drawn at random: the control."""

    seed: int = 0

    def select(self, norms: Tensor, samples: int, tokens: int, number: int) -> tuple[Tensor, Tensor]:
        rng = rng_for(self.seed, "probe", number)
        drawn = (np.sort(rng.permutation(size)[:number]) for size, number in zip(norms.shape, (samples, tokens), strict=True))
        rows, columns = (torch.from_numpy(d).to(norms.device) for d in drawn)
        return rows, columns


@dataclass(frozen=True)
class FullBatch:
    """Everything: the upper bound, at the cost of running every block twice."""

    def select(self, norms: Tensor, samples: int, tokens: int, number: int) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(size, device=norms.device) for size in norms.shape)
        return rows, columns


class Fusion(Protocol):
    """Energy of each channel from what the probe saw and what was seen before."""

    probes: bool  # False: the probe is not looked at, so none is run

    def fuse(self, probe: Tensor, history: Tensor) -> Tensor:
        """(m, C) from mean squares (m, C) of the probe and of the history at the probe's positions."""
        ...


@dataclass(frozen=True)
class ImportanceScaled:
    """Each weighs by its own size: ``(P^2 + G^2) / (P + G)``, so the larger of the two dominates."""

    probes = True

    def fuse(self, probe: Tensor, history: Tensor) -> Tensor:
        share = probe / (probe + history + EPSILON)
        return share * probe + (1 - share) * history


@dataclass(frozen=True)
class FixedRatio:
    """``weight`` of the probe, the rest of the history."""

    weight: float = 0.5
    probes = True

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight!r}")

    def fuse(self, probe: Tensor, history: Tensor) -> Tensor:
        return self.weight * probe + (1 - self.weight) * history


@dataclass(frozen=True)
class ProbeOnly:
    """What the probe saw."""

    probes = True

    def fuse(self, probe: Tensor, history: Tensor) -> Tensor:
        return probe


@dataclass(frozen=True)
class HistoryOnly:
    """What was seen in calibration: a mask that never changes."""

    probes = False

    def fuse(self, probe: Tensor, history: Tensor) -> Tensor:
        return history


class ChannelImportance(Protocol):
    """What a channel is worth: a function of its energy, times a constant of the weights that read it."""

    compensates: bool  # True: the mean of what leaves stays, as a bias

    def constant(self, weight: Tensor) -> Tensor:
        """(C,) of the columns of the output projection ``weight`` (C, D)."""
        ...

    def scores(self, energy: Tensor, variance: Tensor, constant: Tensor, width: int) -> Tensor:
        """(U,) of units of ``width`` channels from ``energy`` (C,), summed mean squares, and the calibration's ``variance`` (C,)."""
        ...


@dataclass(frozen=True)
class PPImportance:
    """``||f_c W_c^2||_2``, the square inside and the norm outside, over all channels of a unit."""

    compensates = False

    def constant(self, weight: Tensor) -> Tensor:
        return (weight.float() ** 4).sum(1).sqrt()

    def scores(self, energy: Tensor, variance: Tensor, constant: Tensor, width: int) -> Tensor:
        found: Tensor = (energy * constant).view(-1, width).norm(dim=1)
        return found


@dataclass(frozen=True)
class WandaImportance:
    """``sqrt(f_c) sum |W_c|``, summed over the channels of a unit (Wanda-sp, after arXiv:2306.11695)."""

    compensates = False

    def constant(self, weight: Tensor) -> Tensor:
        return weight.float().abs().sum(1)

    def scores(self, energy: Tensor, variance: Tensor, constant: Tensor, width: int) -> Tensor:
        return (energy.sqrt() * constant).view(-1, width).sum(1)


@dataclass(frozen=True)
class FLAPImportance:
    """Variance times ``sum W_c^2``, mean over the channels of a unit, with the mean of what leaves as a bias (arXiv:2312.11983).

    Here every block loses its share, as with the other scores; :class:`fedsim.pruning.FLAP` ranks the whole model.
    """

    compensates = True

    def constant(self, weight: Tensor) -> Tensor:
        return (weight.float() ** 2).sum(1)

    def scores(self, energy: Tensor, variance: Tensor, constant: Tensor, width: int) -> Tensor:
        return (variance * constant).view(-1, width).mean(1)


def mean_squares(states: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares (L, C) of ``states`` (B, L, C) over the samples that are ``real`` (B, L) there, 0 where none is; and how many (L,)."""
    weight = real.to(torch.float32)
    number, summed = weight.sum(0), states.new_zeros(states.shape[1:], dtype=torch.float32)
    for sample, counts in zip(states, weight, strict=True):  # what one sample needs stays in the cache; squares of all would not
        own = sample.float()
        summed.addcmul_(own, own * counts[:, None])
    return summed / number.clamp(min=1)[:, None], number


def probe_size(batch: int, length: int, samples: float, tokens: float) -> tuple[int, int]:
    """How many samples and tokens probe: shares rounded up, at least two tokens (one where there is no second)."""
    return math.ceil(samples * batch), min(length, max(math.ceil(tokens * length), 2))


def _largest(values: Tensor, number: int) -> Tensor:
    """Indices of the ``number`` largest, ascending; of equals the first."""
    return torch.sort(values, descending=True, stable=True).indices[:number].sort().values
