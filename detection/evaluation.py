"""Scores of detectors over many runs. Delays count observations used, ``T - nu + 1``: 1 is an alarm on the first changed value."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def average_run_length(ticks: ArrayLike, censored: ArrayLike | None = None) -> float:
    """Mean ticks to a false alarm: all ticks watched, (R,), over the runs that ended in an alarm; ``nan`` when none did.

    ``censored`` (R,) marks runs that ended without an alarm; their ticks count, they do not.

    >>> average_run_length([100, 300, 500], censored=[False, False, True])
    450.0
    """
    watched = np.asarray(ticks, dtype=np.float64)
    ended = np.ones(watched.shape, dtype=bool) if censored is None else ~np.asarray(censored, dtype=bool)
    if ended.shape != watched.shape:
        raise ValueError(f"censored must have the shape of ticks {watched.shape}, got {ended.shape}")
    return float(watched.sum() / ended.sum()) if ended.any() else float("nan")


@dataclass(frozen=True, kw_only=True)
class Delay:
    """``mean`` delay in observations used over the ``detected`` runs (``nan`` for none), with runs ``missed`` and ``false_alarms`` apart."""

    mean: float
    detected: int
    missed: int
    false_alarms: int


def detection_delay(ticks: ArrayLike, nu: ArrayLike) -> Delay:
    """Delays ``T - nu + 1`` of first alarms ``ticks`` (R,) after changes ``nu`` (R,) or one number; ``nan`` is "none" in both.

    An alarm before the change, or where there is none, is a false alarm: excluded from the mean, and counted. Run scores of a fleet
    count elapsed ticks ``T - nu`` instead, one less.

    >>> detection_delay([12.0, 5.0, float("nan")], nu=10)
    Delay(mean=3.0, detected=1, missed=1, false_alarms=1)
    """
    alarm, change = np.broadcast_arrays(np.asarray(ticks, dtype=np.float64), np.asarray(nu, dtype=np.float64))
    detected = alarm >= change
    false = ~np.isnan(alarm) & ~detected
    missed = np.isnan(alarm) & ~np.isnan(change)
    mean = float((alarm - change + 1)[detected].mean()) if detected.any() else float("nan")
    return Delay(mean=mean, detected=int(detected.sum()), missed=int(missed.sum()), false_alarms=int(false.sum()))
