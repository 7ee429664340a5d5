"""A study measures claims. Each claim carries a bar written before the measurement; the value stays when it disappoints.

A study is a module with ``run(quick, out) -> list[Claim]`` that prints its tables and writes figures under ``out``;
:func:`main` makes it a command, :func:`conduct` runs it and writes ``out/results.json``.
"""

import argparse
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from math import isfinite, nan, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fedsim.runs.files import write_atomically, write_json
from fedsim.runs.style import png
from fedsim.runs.text import aligned, number

_BAR = re.compile(r"(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)(?:\s+(\S.*))?")
_MEETS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
}
_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "ray")


class Skipped(Exception):  # noqa: N818 - not an error
    """Raised by a study that needs data which is not here; its text says what to do. A skipped study has not failed."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A measured ``value`` +- ``spread`` (standard error over ``seeds``) and the ``bar`` it must meet: an operator, a number, a unit.

    A ``nan`` value meets no bar. ``note`` says what a reader must know, above all why a claim does not hold.

    >>> Claim(name="KL group - FedAvg", value=9.5, spread=1.2, bar=">= 8 points", seeds=5).holds
    True
    """

    name: str
    value: float
    spread: float
    bar: str
    seeds: int
    note: str = ""

    def __post_init__(self) -> None:
        if not _BAR.fullmatch(self.bar):
            raise ValueError(f"bar of {self.name!r} must be an operator, a number and a unit such as '>= 8 points', got {self.bar!r}")
        if self.seeds < 1:
            raise ValueError(f"seeds of {self.name!r} must be >= 1, got {self.seeds}")

    @classmethod
    def measured(cls, name: str, samples: Sequence[float], *, bar: str, note: str = "") -> "Claim":
        """The mean of one sample a seed, with its standard error (``nan`` for a single seed)."""
        return cls(name=name, value=fmean(samples), spread=standard_error(samples), bar=bar, seeds=len(samples), note=note)

    @property
    def holds(self) -> bool:
        operator, limit, _ = self._parts()
        return bool(_MEETS[operator](self.value, float(limit)))  # a NumPy value would make a NumPy bool, which JSON refuses

    @property
    def unit(self) -> str:
        return self._parts()[2]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": _finite(self.value),
            "spread": _finite(self.spread),
            "bar": self.bar,
            "holds": self.holds,
            "seeds": self.seeds,
            "note": self.note,
        }

    def _parts(self) -> tuple[str, str, str]:
        found = _BAR.fullmatch(self.bar)
        assert found is not None, "checked at construction"
        return found[1], found[2], found[3] or ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a study: its claims, or why there are none."""

    study: str
    status: Literal["done", "skipped", "failed"]
    claims: tuple[Claim, ...] = ()
    reason: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """No failure and no claim below its bar; a skipped study holds."""
        return self.status != "failed" and all(claim.holds for claim in self.claims)

    def as_json(self) -> dict[str, Any]:
        status = "skipped: " + self.reason if self.status == "skipped" else self.status
        return {
            "study": self.study,
            "status": status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "claims": [claim.as_json() for claim in self.claims],
        }


Study = Callable[[bool, Path], Sequence[Claim]]


def conduct(name: str, run: Study, quick: bool, out: Path) -> Outcome:
    """Run one study and write ``out/results.json``. An exception other than :class:`Skipped` is printed and makes it failed."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        claims = tuple(run(quick, out))
        outcome = Outcome(study=name, status="done", claims=claims, seconds=time.perf_counter() - start)
    except Skipped as skipped:
        outcome = Outcome(study=name, status="skipped", reason=str(skipped))
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        outcome = Outcome(study=name, status="failed", reason=reason, seconds=time.perf_counter() - start)
    write_json(out / "results.json", {**outcome.as_json(), **provenance(quick)})
    return outcome


def main(name: str, run: Study) -> int:
    """The command line of one study; the exit code says whether all of its claims hold."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.studies.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and settings, for two cores")
    parser.add_argument("--out", type=Path, default=Path("results") / name, help="folder of figures and results.json")
    options = parser.parse_args()
    outcome = conduct(name, run, options.quick, options.out)
    print(table([outcome]))
    return 0 if outcome.holds else 1


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a claim, with the notes below; a study without claims says why."""
    rows, notes = [], []
    for outcome in outcomes:
        for claim in outcome.claims:
            spread = f" +- {number(claim.spread, 2)}" if isfinite(claim.spread) else ""
            verdict = "yes" if claim.holds else "NO"
            rows.append([f"{outcome.study}: {claim.name}", f"{number(claim.value)}{spread}", claim.bar, verdict, str(claim.seeds)])
            notes += [f"{claim.name}: {claim.note}"] if claim.note else []
        if outcome.status != "done":
            rows.append([f"{outcome.study}: {outcome.status}", "–", "–", "–" if outcome.holds else "NO", "–"])
            notes.append(f"{outcome.study} {outcome.status}: {outcome.reason}")
    return "\n".join([aligned(["claim", "measured", "bar", "holds", "seeds"], rows), *notes])


def standard_error(samples: Sequence[float]) -> float:
    """Of the mean; ``nan`` for fewer than two samples."""
    return stdev(samples) / sqrt(len(samples)) if len(samples) > 1 else nan


def save_figure(drawn: Figure, path: Path) -> None:
    """As PNG on white, atomically."""
    write_atomically(path, lambda file: file.write(png(drawn)))


def plain_log(axes: Axes) -> None:
    """Ticks of a logarithmic horizontal axis as plain numbers."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)


def provenance(quick: bool) -> dict[str, Any]:
    """When, on what and with which versions."""
    return {
        "quick": quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in _PACKAGES}},
    }


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return float(value) if isfinite(value) else None
