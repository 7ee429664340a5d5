"""What the output projections of a model have read: the history that Probe Pruning fuses with its probes, a value that can be stored and merged."""

# B samples, L positions, C input channels of an output projection

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.llm.probing import mean_squares


@dataclass(frozen=True, eq=False)
class Seen:
    """Of one projection: mean squares ``squares`` (L, C) of ``number`` (L,) states at each position, ``mean`` and ``variance`` (C,) over all.

    Float32. Positions never seen have zeros.
    """

    squares: Tensor
    number: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, states: Tensor, real: Tensor) -> "Seen":
        """Of ``states`` (B, L, C) where they are ``real`` (B, L)."""
        squares, number = mean_squares(states, real)
        some = states[real].double()
        mean = some.mean(0) if len(some) else some.new_zeros(some.shape[1])
        variance = ((some - mean) ** 2).mean(0) if len(some) else torch.zeros_like(mean)
        return cls(squares, number, mean.float(), variance.float())

    def merged(self, other: "Seen") -> "Seen":
        """As if the states of both had been seen at once; the longer of the two says how many positions there are."""
        length = max(len(self.number), len(other.number))
        number = torch.stack([_longer(s.number, length) for s in (self, other)])
        squares = torch.stack([_longer(s.squares, length) for s in (self, other)])
        share = number / number.sum(0).clamp(min=1)
        whole = number.sum(1).double()
        weight = (whole / whole.sum().clamp(min=1))[:, None]
        means = torch.stack([self.mean, other.mean]).double()
        variances = torch.stack([self.variance, other.variance]).double()
        mean = (weight * means).sum(0)
        variance = (weight * (variances + (means - mean) ** 2)).sum(0)
        return Seen((share[:, :, None] * squares).sum(0), number.sum(0), mean.float(), variance.float())


@dataclass(frozen=True, eq=False)
class History:
    """:class:`Seen` by the name of each output projection."""

    sites: Mapping[str, Seen]

    @property
    def length(self) -> int:
        """Positions it knows."""
        return max((len(seen.number) for seen in self.sites.values()), default=0)

    @classmethod
    def merged(cls, histories: Sequence["History"]) -> "History":
        """Several histories of one model as one, each weighted by what it saw. Raises ``ValueError`` for none."""
        if not histories:
            raise ValueError("there is no history to merge")
        return reduce(lambda a, b: cls({name: seen.merged(b.sites[name]) for name, seen in a.sites.items()}), histories)

    def check(self, channels: Mapping[str, int]) -> None:
        """``ValueError`` unless it is of a model whose projections read so many ``channels``."""
        for name, number in channels.items():
            if name not in self.sites:
                raise ValueError(f"the history knows nothing of {name}: it belongs to another model; calibrate first")
            if self.sites[name].squares.shape[1] != number:
                raise ValueError(
                    f"{name} reads {number} channels, the history has {self.sites[name].squares.shape[1]}: calibrate on the model as it is deployed"
                )

    def on(self, device: torch.device) -> "History":
        """With its tensors on ``device``."""
        return History(
            {n: Seen(s.squares.to(device), s.number.to(device), s.mean.to(device), s.variance.to(device)) for n, s in self.sites.items()}
        )

    def save(self, path: str | Path) -> None:
        """Write it as one ``.npz`` file."""
        arrays = {f"{name}/{field}": getattr(seen, field).cpu().numpy() for name, seen in self.sites.items() for field in _FIELDS}
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """What :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            names = dict.fromkeys(key.rpartition("/")[0] for key in arrays.files)
            return cls({name: Seen(*(torch.from_numpy(arrays[f"{name}/{field}"]) for field in _FIELDS)) for name in names})


_FIELDS = ("squares", "number", "mean", "variance")


def _longer(values: Tensor, length: int) -> Tensor:
    """With zeros for positions up to ``length``."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
