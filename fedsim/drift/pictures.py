"""Corruptions of pictures with values in [0, 1], after Hendrycks and Dietterich (2019), arXiv:1903.12261.

A corruption is given by its own parameter (``GaussianNoise(0.8)`` is sigma .8) or by ``severity`` in [0, 5], read from the
table for the picture's size and interpolated linearly; with neither, severity 5. Inputs are (..., side * side) or
(..., H, W), (..., C, H, W); shape and dtype are kept and values clipped to [0, 1].

Exports: Contrast, Corruption, GaussianBlur, GaussianNoise, Invert, Rotation.
"""

# N pictures, C channels, H height, W width

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsim.drift.changes import Cells, Change, Draws, Floats, Inputs, Targets

Table = tuple[float, float, float, float, float]


class Corruption(Change):
    """Base of the corruptions: a parameter that runs from ``neutral`` (nothing happens) to its full value with the strength.

    ``parameter`` names the field; ``tables`` maps the largest side in pixels a table is meant for to the parameter at
    severities 1 to 5.
    """

    morphs: ClassVar[bool] = True
    parameter: ClassVar[str]
    neutral: ClassVar[float] = 0.0
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = np.inf
    tables: ClassVar[dict[float, Table]]
    severity: float | None

    def __post_init__(self) -> None:
        if self.value is not None and self.severity is not None:
            raise ValueError(f"give {self.parameter}= or severity=, not both, got {self}")
        if self.severity is not None and not 0 <= self.severity <= 5:
            raise ValueError(f"severity must lie in [0, 5], got {self.severity!r}")
        if self.value is not None and not (self.lowest <= self.value <= self.highest and np.isfinite(self.value)):
            raise ValueError(f"{self.parameter} must be finite and lie in [{self.lowest}, {self.highest}], got {self.value!r}")

    @property
    def value(self) -> float | None:
        """The parameter at full strength, where it is given rather than looked up."""
        given: float | None = getattr(self, self.parameter)
        return given

    def check(self, inputs: Inputs, cells: Cells) -> None:
        as_pictures(inputs[:1])
        low, high = float(inputs.min()), float(inputs.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{type(self).__name__} needs inputs in [0, 1], got values from {low:.3g} to {high:.3g}; scale pictures in the task's load()"
            )

    def apply(self, inputs: Inputs, targets: Targets, strength: Floats, draws: Draws) -> tuple[Inputs, Targets]:
        ticks = np.asarray((strength > 0).any(axis=1))
        if not ticks.any():
            return inputs, targets
        some = strength[ticks]
        touched = some > 0
        chosen = inputs[ticks]
        pictures = as_pictures(chosen[touched])
        noise = self.noise(draws.at(ticks), chosen.shape[2:])
        level = self.level(some[touched], max(pictures.shape[2:]))
        changed = self.corrupt(pictures, level, None if noise is None else noise[touched].reshape(pictures.shape))
        chosen[touched] = np.clip(changed, 0, 1).reshape(chosen[touched].shape)
        out = inputs.copy()
        out[ticks] = chosen
        return out, targets

    def alters(self, weights: Floats, cells: Cells, rng: np.random.Generator) -> bool:
        return bool((self.level(np.ones(1), 1) != self.neutral).any())

    def level(self, strength: Floats, side: int) -> Floats:
        """The parameter (N,) at ``strength`` (N,) for pictures of ``side`` pixels."""
        if self.value is not None:
            return self.neutral + strength * (self.value - self.neutral)
        table = next(table for largest, table in self.tables.items() if side <= largest)
        return np.interp(strength * (5.0 if self.severity is None else self.severity), np.arange(6), (self.neutral, *table))

    def noise(self, draws: Draws, shape: tuple[int, ...]) -> Inputs | None:
        """Random numbers (T, B, *shape) the corruption needs, or none."""
        return None

    @abstractmethod
    def corrupt(self, pictures: Inputs, level: Floats, noise: Inputs | None) -> Inputs:
        """``pictures`` (N, C, H, W) at parameter ``level`` (N,)."""


@dataclass(frozen=True)
class GaussianNoise(Corruption):
    """x + sigma n. Tables: ours for digits, CIFAR-10-C up to 48 pixels, ImageNet-C above."""

    parameter: ClassVar[str] = "sigma"
    tables: ClassVar[dict[float, Table]] = {
        16: (0.1, 0.2, 0.3, 0.4, 0.5),
        48: (0.04, 0.06, 0.08, 0.09, 0.10),
        np.inf: (0.08, 0.12, 0.18, 0.26, 0.38),
    }

    sigma: float | None = None
    severity: float | None = None

    def noise(self, draws: Draws, shape: tuple[int, ...]) -> Inputs:
        return draws.normals(shape)

    def corrupt(self, pictures: Inputs, level: Floats, noise: Inputs | None) -> Inputs:
        assert noise is not None
        return pictures + _each(level, pictures) * noise


@dataclass(frozen=True)
class GaussianBlur(Corruption):
    """Convolution with a Gaussian of this many pixels; borders repeat the edge."""

    parameter: ClassVar[str] = "sigma"
    tables: ClassVar[dict[float, Table]] = {48: (0.4, 0.6, 0.7, 0.8, 1.0), np.inf: (1.0, 2.0, 3.0, 4.0, 6.0)}

    sigma: float | None = None
    severity: float | None = None

    def corrupt(self, pictures: Inputs, level: Floats, noise: Inputs | None) -> Inputs:
        from scipy.ndimage import gaussian_filter

        out = np.empty_like(pictures)
        for sigma in np.unique(level):
            same = level == sigma
            out[same] = gaussian_filter(pictures[same], (0, 0, sigma, sigma), mode="nearest")
        return out


@dataclass(frozen=True)
class Rotation(Corruption):
    """Turned counterclockwise by this many degrees about the centre: bilinear, filled with 0; exact at multiples of 90."""

    lowest: ClassVar[float] = -360.0
    highest: ClassVar[float] = 360.0
    parameter: ClassVar[str] = "degrees"
    tables: ClassVar[dict[float, Table]] = {np.inf: (15.0, 30.0, 45.0, 60.0, 90.0)}

    degrees: float | None = None
    severity: float | None = None

    def corrupt(self, pictures: Inputs, level: Floats, noise: Inputs | None) -> Inputs:
        flat = pictures.reshape(*pictures.shape[:2], -1)
        out = np.empty_like(flat)
        for degrees in np.unique(level):
            same = level == degrees
            sources, shares = _turn(pictures.shape[2], pictures.shape[3], float(degrees))
            out[same] = sum(flat[same][:, :, source] * share.astype(flat.dtype) for source, share in zip(sources, shares, strict=True))
        return out.reshape(pictures.shape)


@dataclass(frozen=True)
class Invert(Corruption):
    """A blend of the picture with its negative: (1 - a) x + a (1 - x)."""

    highest: ClassVar[float] = 1.0
    parameter: ClassVar[str] = "amount"
    tables: ClassVar[dict[float, Table]] = {np.inf: (0.2, 0.4, 0.6, 0.8, 1.0)}

    amount: float | None = None
    severity: float | None = None

    def corrupt(self, pictures: Inputs, level: Floats, noise: Inputs | None) -> Inputs:
        a = _each(level, pictures)
        return (1 - a) * pictures + a * (1 - pictures)


@dataclass(frozen=True)
class Contrast(Corruption):
    """(x - m) c + m with m the mean of each picture's channel; c = 1 leaves it alone."""

    neutral: ClassVar[float] = 1.0
    parameter: ClassVar[str] = "factor"
    tables: ClassVar[dict[float, Table]] = {np.inf: (0.75, 0.5, 0.4, 0.3, 0.15)}

    factor: float | None = None
    severity: float | None = None

    def corrupt(self, pictures: Inputs, level: Floats, noise: Inputs | None) -> Inputs:
        mean = pictures.mean(axis=(2, 3), keepdims=True)
        return np.asarray((pictures - mean) * _each(level, pictures) + mean)


def as_pictures(inputs: Inputs) -> Inputs:
    """``inputs`` (N, side * side), (N, H, W) or (N, C, H, W) as (N, C, H, W). Raises ``ValueError`` for anything else."""
    if inputs.ndim == 4:
        return inputs
    if inputs.ndim == 3:
        return inputs[:, None]
    side = isqrt(inputs.shape[-1]) if inputs.ndim == 2 else 0
    if side == 0 or side * side != inputs.shape[-1]:
        raise ValueError(f"picture corruptions need inputs of shape (side * side,), (H, W) or (C, H, W), got {inputs.shape[1:]}")
    return inputs.reshape(len(inputs), 1, side, side)


def _each(level: Floats, pictures: Inputs) -> Inputs:
    """``level`` (N,) against (N, C, H, W), in the pictures' own precision."""
    return np.asarray(level.astype(pictures.dtype)[:, None, None, None])


@lru_cache(maxsize=256)
def _turn(height: int, width: int, degrees: float) -> tuple[NDArray[np.int64], Floats]:
    """For every output pixel its four source pixels (4, H * W) and their bilinear shares, 0 outside the picture."""
    rows, columns = np.indices((height, width)).astype(np.float64)
    y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    # rounding keeps right angles exact: cos(90 degrees) is 6e-17, not 0
    row = np.round(cos * y + sin * x + (height - 1) / 2, 9)
    column = np.round(cos * x - sin * y + (width - 1) / 2, 9)
    sources, shares = [], []
    for r, c in ((np.floor(row) + i, np.floor(column) + j) for i in (0, 1) for j in (0, 1)):
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        share = (1 - abs(row - r)) * (1 - abs(column - c))
        sources.append(np.where(inside, r * width + c, 0).astype(np.int64).ravel())
        shares.append(np.where(inside, share, 0.0).ravel())
    return np.stack(sources), np.stack(shares)
