"""Device classes: which of them changed, and which of their streams, both with a bounded share of false discoveries.

The two lists agree: a class is declared only with a stream of its own, a stream only within a declared class. This is the e-value form of
the p-filter (Barber and Ramdas 2017); each list is self-consistent, which is enough for e-values (Wang and Ramdas 2022, arXiv:2009.02824).
Exports ``group_discoveries``, ``GroupDiscoveries`` and ``onsets``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detection.detector import Mask, Ticks, checked_mask
from detection.e_processes import e_bh, mean_e
from detection.laws import Array

Merge = Callable[[ArrayLike, NDArray[np.integer[Any]], int], Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupDiscoveries:
    """Declared ``groups`` (G,) and ``streams`` (N,), with the logarithms ``group_log_e`` (G,) of the groups' e-values."""

    groups: Mask
    streams: Mask
    group_log_e: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Onsets:
    """When the declared streams of each group (G,) changed: the quartiles ``early`` and ``late``, their ``middle``, and the ``count``; ``nan``
    for a group without any. ``late - early`` is the onset spread: small for one cause at one time."""

    early: Array
    middle: Array
    late: Array
    count: NDArray[np.int64]


def group_discoveries(
    log_e: ArrayLike, groups: NDArray[np.integer[Any]], alpha: float, *, group_alpha: float | None = None, merge: Merge = mean_e
) -> GroupDiscoveries:
    """Groups and streams declared changed, with FDR at most ``alpha`` among streams and ``group_alpha`` (the same by default) among groups.

    ``log_e`` (N,) are logarithms of e-values, ``groups`` (N,) holds the group of each stream, ``0 .. G - 1``. A group's null is that none of its
    streams has changed. ``merge`` is :func:`detection.mean_e`, valid under any dependence, or for independent streams :func:`detection.product_e`,
    stronger where most streams of a class change and weaker where few do. The largest pair of lists in which every declared stream has
    ``e >= N / (alpha |streams|)``, every declared group the same of its own, and the two agree; scope as for :func:`detection.e_bh`. Costs
    some power among streams where a class as a whole does not stand out: :func:`detection.e_bh` alone is the list of streams then.
    """
    log_e, groups = np.asarray(log_e, dtype=np.float64), np.asarray(groups)
    num = int(groups.max(initial=-1)) + 1
    merged = merge(log_e, groups, num)
    own_alpha = alpha if group_alpha is None else group_alpha
    declared, before = np.ones(num, np.bool_), -1
    streams = np.ones(len(log_e), np.bool_)
    while int(declared.sum()) != before:
        before = int(declared.sum())
        streams = e_bh(log_e=np.where(declared[groups], log_e, -np.inf), alpha=alpha)
        alive = np.bincount(groups[streams], minlength=num) > 0
        declared = e_bh(log_e=np.where(declared & alive, merged, -np.inf), alpha=own_alpha)
    return GroupDiscoveries(groups=declared, streams=streams & declared[groups], group_log_e=merged)


def onsets(since: Ticks, streams: Mask, groups: NDArray[np.integer[Any]]) -> Onsets:
    """Quartiles of the change estimates ``since`` (N,) of the declared ``streams`` (N,) in each of the ``groups`` (N,).

    Estimates count a stream's own observations from its (re)start; with absences, turn them into ticks of the fleet first.
    """
    streams, num = checked_mask(streams, len(groups), "streams"), int(groups.max(initial=-1)) + 1
    quartiles = np.full((3, num), np.nan)
    for group in np.unique(groups[streams]):
        quartiles[:, group] = np.quantile(since[streams & (groups == group)], (0.25, 0.5, 0.75))
    early, middle, late = quartiles
    return Onsets(early=early, middle=middle, late=late, count=np.bincount(groups[streams], minlength=num))
