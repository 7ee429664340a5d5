"""Normal scores of a million losses a tick: :meth:`detection.FittedScores.transform` read off a table, within a stated bound.

The exact transform ranks every residual in the pool; the table holds the exact scores at the middle of even cells of residuals. What a
detector adds for a score can be tabled just as well: :meth:`TabledScores.increment` reads it off in the same look.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.increment import Increment
from detection.laws import Array
from detection.normal_scores import FittedScores, check_sign

_BLOCK = 65_536  # losses at once
_CELLS = 2**15
_SINGLE = 2.0**-21  # error of a logarithm and its line in single precision, over their size


@dataclass(frozen=True, kw_only=True, eq=False)
class TabledScores:
    """Scores of ``fitted`` by table. No score differs from the exact one by more than ``bound``, which a gap between the most extreme
    residuals decides; in control the error is about a quarter of a cell, ``1e-4`` for a fleet's pool.
    """

    fitted: FittedScores
    bound: float
    table: "Table"

    @classmethod
    def of(cls, fitted: FittedScores, cells: int = _CELLS) -> "TabledScores":
        """Table of ``cells`` cells over the pooled residuals. Make it anew after :meth:`detection.FittedScores.refit`."""
        if cells < 16:
            raise ValueError(f"cells must be at least 16, got {cells!r}")
        width = float(fitted.pool[-1] - fitted.pool[0]) / (cells - 2)
        low = float(fitted.pool[0]) - width
        edges = fitted.scores_of(low + np.arange(-1.0, cells + 2.0) * width)
        lines = np.float32 if _single_is_enough(fitted, width) else np.float64
        table = Table(
            values=fitted.scores_of(low + (np.arange(0.0, cells) + 0.5) * width),
            top=fitted.config.clip,
            gain=(1.0 / (width * fitted.deviation)).astype(lines),
            shift=(-(fitted.location / fitted.deviation + low) / width).astype(lines),
            floor=fitted.floor,
            scale=fitted.config.scale,
        )
        return cls(fitted=fitted, bound=float((edges[3:] - edges[:-3]).max()), table=table)  # a cell, and one more each side for rounding

    def transform(self, losses: ArrayLike, out: Array | None = None) -> Array:
        """Scores of one tick's ``losses`` (N,), written to ``out`` (N,) f64 where given. Edges and errors as for the exact transform."""
        losses = np.asarray(losses, dtype=np.float64)
        if losses.shape != self.table.gain.shape:
            raise ValueError(f"losses must hold one value for each of {len(self.table.gain)} clients, got shape {losses.shape}")
        out = np.empty(losses.shape) if out is None else out
        for start in range(0, len(losses), _BLOCK):
            rows = slice(start, start + _BLOCK)
            self.table.at(rows).read(losses[rows], out[rows])
        return out

    def increment(self, z: Increment) -> "Table":
        """What ``z``, an increment of scores, adds for a loss: as :meth:`transform`, then ``z``, in one look. For ``z`` shared by all streams."""
        return replace(self.table, values=z(self.table.values), top=float(z(np.array([self.table.top]))[0]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """``values`` (cells,) by cell; ``gain`` and ``shift`` (N,) take a client's loss (on its ``scale``) to its cell, ``inf`` has the value ``top``.

    Logarithms and cells are computed in the precision of ``gain`` and ``shift``: single where that moves no residual by half a cell.
    """

    values: Array
    top: float
    gain: NDArray[np.floating]
    shift: NDArray[np.floating]
    floor: float
    scale: str

    def __call__(self, x: Array) -> Array:
        """Values (N,) of the losses ``x`` (N,)."""
        return self.read(x, np.empty(len(x)))

    def scaled(self, multiplier: float) -> "Table":
        """``multiplier`` times the values."""
        return replace(self, values=multiplier * self.values, top=multiplier * self.top)

    @property
    def streams(self) -> int:
        """Number of streams."""
        return len(self.gain)

    def at(self, rows: slice) -> "Table":
        """That of the streams ``rows``."""
        return replace(self, gain=self.gain[rows], shift=self.shift[rows])

    def read(self, losses: Array, out: Array) -> Array:
        """Values of ``losses`` (N,) in ``out`` (N,); ``nan`` for ``nan``. Raises ``ValueError`` for a sign that ``scale`` cannot take."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            place = losses.astype(self.gain.dtype)
            if self.scale == "log":
                place += place.dtype.type(self.floor)
                np.log(place, out=place)
            place *= self.gain
            place += self.shift
            np.fmin(place, place.dtype.type(len(self.values) - 1), out=place)
            np.take(self.values, place.astype(np.intp), out=out, mode="clip")  # below the table is its first cell
        least = 0.0 if self.scale == "log" else -np.finfo(np.float64).max
        return out if losses.min() >= least and losses.max() < np.inf else self._mended(losses, out)

    def _mended(self, losses: Array, out: Array) -> Array:
        """Losses that are missing, infinite or of the wrong sign, by the rules of the exact transform."""
        check_sign(losses, self.scale)
        np.copyto(out, self.top, where=losses == np.inf)
        np.copyto(out, np.nan, where=np.isnan(losses))
        return out


def _single_is_enough(fitted: FittedScores, width: float) -> bool:
    reach = np.abs(fitted.location) + 10 * fitted.deviation
    small = fitted.config.scale == "log" and fitted.floor > 1e-30
    return small and bool((_SINGLE * reach <= 0.5 * width * fitted.deviation).all())
