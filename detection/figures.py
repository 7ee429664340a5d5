"""Figures of detectors, as matplotlib ``Figure`` objects to save or show; nothing global is touched.

``operating_curves`` (delay against run length), ``statistic_path`` (one stream's statistic and its alarm) and ``delay_by_shift`` (designs against
true shifts). Needs matplotlib.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from detection.detector import Detector
from detection.evaluation import Evaluation, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (6.0, 3.8)  # inches


def operating_curves(curves: Mapping[str, Sequence[Evaluation]]) -> "Figure":
    """Mean delay against average run length, one line a detector, with 95 % bars; points without a run length or a delay are left out.

    Raises ``ValueError`` without curves.
    """
    figure, axes = _axes("average run length in control (ticks)", "mean delay (observations)")
    _need(curves, "curves")
    for name, points in curves.items():
        shown = [point for point in points if np.isfinite([point.arl.value, point.delay.value]).all()]
        arls, delays = [point.arl for point in shown], [point.delay for point in shown]
        axes.errorbar(_values(arls), _values(delays), xerr=_bars(arls), yerr=_bars(delays), label=name, marker="o", markersize=3, capsize=2)
    axes.set_xscale("log")
    axes.legend(frameon=False)
    return figure


def statistic_path(detector: Detector[Any], values: ArrayLike, nu: float | None = None) -> "Figure":
    """The statistic of one stream ``values`` (T,) or (T, d) with the threshold, the first alarm, the estimated change and the true one ``nu``.

    Ticks count from 1. Raises ``ValueError`` for a stream without observations.
    """
    stream = np.asarray(values, dtype=np.float64)
    _need(stream, "values")
    state, path, alarm = detector.init(1), [], None
    for tick, x in enumerate(stream, start=1):
        state = detector.step(state, x[None])
        path.append(float(detector.statistic(state)[0]))
        if alarm is None and detector.alarms(state)[0]:
            alarm, start = tick, int(detector.changed_at(state)[0])
    figure, axes = _axes("tick", "statistic")
    axes.plot(np.arange(1, len(path) + 1), path, color="0.3", linewidth=1, label="statistic")
    axes.axhline(detector.threshold, color="C3", linestyle="--", linewidth=1, label="threshold")
    if nu is not None and not np.isnan(nu):
        axes.axvline(nu, color="C2", linewidth=1, label="true change")
    if alarm is not None:
        axes.axvline(start, color="C0", linestyle=":", linewidth=1, label="estimated change")
        axes.plot([alarm], [path[alarm - 1]], color="C3", marker="v", linestyle="none", label="alarm")
    axes.legend(frameon=False)
    return figure


def delay_by_shift(shifts: ArrayLike, delays: Mapping[str, ArrayLike]) -> "Figure":
    """Mean delays (S,) against the true ``shifts`` (S,), one line a design, the worst point of each marked.

    Raises ``ValueError`` without designs, and for delays that do not match the shifts.
    """
    true = np.asarray(shifts, dtype=np.float64)
    _need(delays, "delays")
    figure, axes = _axes("true shift (standard deviations)", "mean delay (observations)")
    for name, line in delays.items():
        mean = np.asarray(line, dtype=np.float64)
        if mean.shape != true.shape or true.ndim != 1:
            raise ValueError(f"delays of {name!r} must be one for each shift {true.shape}, got {mean.shape}")
        (drawn,) = axes.plot(true, mean, marker="o", markersize=3, label=name)
        worst = int(np.nanargmax(mean))
        axes.plot(true[worst], mean[worst], marker="o", markersize=9, fillstyle="none", linestyle="none", color=drawn.get_color())
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def _axes(across: str, up: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _need(given: Any, name: str) -> None:
    if len(given) == 0:
        raise ValueError(f"{name} must hold at least one, got none")


def _values(measured: Sequence[Measured]) -> list[float]:
    return [one.value for one in measured]


def _bars(measured: Sequence[Measured]) -> Any:
    """Distances (2, n) from the values to the ends of their intervals."""
    ends = np.array([one.interval for one in measured]).reshape(-1, 2)
    values = np.array(_values(measured))
    return np.stack([values - ends[:, 0], ends[:, 1] - values])
