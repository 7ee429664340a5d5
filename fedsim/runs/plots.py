"""The figures of a run, each a function of its tables and of the width it is drawn for; this folder alone imports matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from fedsim.runs.schema import column
from fedsim.runs.scores import NEVER, Scores, World, by_tick, detection_delays, repair_delays
from fedsim.runs.style import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    GRID,
    INK,
    LEVELS,
    MARKERS,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    SERIES,
    WIDE,
    bare,
    figure,
    styled,
    whole_numbers,
)

_ROWS = 160
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")


@styled
def training(rounds: Any, *, width: float = WIDE) -> Figure:
    """Test accuracy by round, and the bytes all clients have sent and received until then."""
    drawn, (left, right) = _panels(width, 2.7)
    at, accuracy = column(rounds, "round"), column(rounds, "test_accuracy")
    tested = np.isfinite(accuracy)
    left.plot(at[tested], accuracy[tested], color=BLUE, marker="o", markersize=3 if tested.sum() < 40 else 0)
    if tested.any():
        left.annotate(
            f"{100 * accuracy[tested][-1]:.1f} %", (at[tested][-1], accuracy[tested][-1]), (0, 6), textcoords="offset points", ha="right"
        )
    left.set_ylim(0, 1.04)
    left.yaxis.set_major_formatter(_PERCENT)
    left.set_title("Test accuracy")
    up, down = (np.cumsum(column(rounds, name)) / 1e6 for name in ("bytes_up", "bytes_down"))
    right.stackplot(
        at, up, down, colors=(ORANGE, BLUE), alpha=0.75, labels=("sent by clients", "received by clients"), edgecolor=PAPER, linewidth=0.6
    )
    right.set_title("Bytes moved so far, MB")
    right.legend(loc="upper left", reverse=True)
    for axes in (left, right):
        axes.set_xlabel("round")
        whole_numbers(axes)
    return drawn


@styled
def devices(deployments: Any, ticks: Any, truth: Any, *, width: float = WIDE) -> Figure:
    """For each device class: the share of its clients at each level, and their accuracy before, after and long after the change."""
    names, index = np.unique(column(deployments, "device"), return_inverse=True)
    order = np.argsort([column(deployments, "sparsity")[index == i].mean() for i in range(len(names))])[::-1]
    height = 1.25 + 0.34 * len(names)
    if not len(ticks):
        drawn = figure(width, height)
        _draw_levels(drawn.add_subplot(), deployments, names, order)
        return drawn
    drawn, (left, right) = _panels(width, height)
    _draw_levels(left, deployments, names, order)
    groups = [column(deployments, "client")[index == i] for i in order]
    _draw_device_accuracy(right, ticks, World.of(ticks, truth), groups)
    right.set_yticks(range(len(names)), [""] * len(names) if width >= 6 else [names[i] for i in order])
    return drawn


@styled
def fleet_loss(ticks: Any, events: Any, truth: Any, *, width: float = WIDE) -> Figure:
    """Mean loss over time of clients that change, clients that do not, and the dense model; below it alarms and redeployments."""
    drawn = figure(width, 4.1)
    loss, alarms, redeployments = drawn.subplots(3, 1, sharex=True, height_ratios=(6, 1, 1))
    world, tick = World.of(ticks, truth), column(ticks, "tick")
    changes = world.change_of(column(ticks, "client")) != NEVER
    series: tuple[tuple[str, str, NDArray[np.bool_], str, Any], ...] = (
        ("clients that stay the same", "loss", ~changes, BLUE, "-"),
        ("clients that change", "loss", changes, RED, "-"),
        ("the same, on the dense model", "dense_loss", changes if changes.any() else ~changes, MUTED, (0, (4, 2))),
    )
    for label, name, rows, colour, dashes in series:
        at, mean = by_tick(tick, column(ticks, name), rows)
        if len(at):
            loss.plot(at, mean, color=colour, alpha=0.25, linewidth=0.8)
            loss.plot(at, _smoothed(mean), color=colour, label=label, linestyle=dashes)
    loss.set_ylim(bottom=0)
    loss.set_title("Mean loss, nats", pad=8 + 14 * (1 if width >= 6 else len(series)))
    loss.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3 if width >= 6 else 1)
    _mark_changes((loss, alarms, redeployments), loss, world)
    _draw_counts(alarms, _ticks_of(events, "alarm"), ORANGE, "alarms")
    _draw_counts(redeployments, _ticks_of(events, "redeployment"), GREEN, "redeployments")
    redeployments.set_xlabel("tick")
    whole_numbers(redeployments)
    return drawn


@styled
def raster(ticks: Any, events: Any, truth: Any, *, width: float = WIDE) -> Figure:
    """What happened to each client that changed or had an event: rows sorted by change point, shaded from it on."""
    world = World.of(ticks, truth)
    chosen = _rows_to_show(world, column(events, "client"))
    change, row = world.change[chosen], {int(c): i for i, c in enumerate(world.clients[chosen])}
    drawn = figure(width, 1.4 + min(3.6, 0.07 * len(chosen)))
    axes = drawn.add_subplot()
    end = int(column(ticks, "tick").max(initial=0)) + 1
    changed = np.flatnonzero(change != NEVER)
    axes.barh(changed, end - change[changed], left=change[changed], height=1.0, color=RED, alpha=0.13, linewidth=0, label="changed")
    for kind, label, colour, marker in (
        ("alarm", "alarm", ORANGE, "o"),
        ("redeployment", "redeployed", GREEN, "D"),
        ("rejected", "candidate refused", INK, "x"),
    ):
        mine = column(events, "kind") == kind
        told = [(t, row[c]) for t, c in zip(column(events, "tick")[mine], column(events, "client")[mine], strict=True) if c in row]
        x, y = np.array(told, np.int64).reshape(-1, 2).T
        axes.scatter(
            x, y, s=13, color=colour, marker=marker, linewidths=0.9 if marker == "x" else 0.3, label=label if told else None, zorder=3
        )
    axes.set(xlim=(0, end), ylim=(len(chosen) - 0.5, -0.5), xlabel="tick", yticks=[])
    bare(axes)
    axes.set_title(f"{len(chosen):,} of {len(world.clients):,} clients, one row each", pad=24 if width >= 6 else 38)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4 if width >= 6 else 2, handletextpad=0.3, columnspacing=1.2)
    whole_numbers(axes)
    return drawn


@styled
def delays(ticks: Any, events: Any, truth: Any, *, width: float = WIDE) -> Figure:
    """Share of changed clients not yet detected, and not yet repaired, by ticks since their change (Kaplan-Meier)."""
    drawn = figure(width, 2.6)
    axes = drawn.add_subplot()
    longest = end = 0.0
    for waits, label, colour, dashes in (
        (detection_delays(ticks=ticks, events=events, truth=truth), "no alarm yet", ORANGE, "-"),
        (repair_delays(ticks=ticks, events=events, truth=truth), "no redeployment yet", GREEN, (0, (5, 1.5))),
    ):
        curve = waits.survival
        x, y = np.append([0.0], curve.times), np.append([1.0], curve.survival)
        axes.step(np.append(x, curve.end), np.append(y, y[-1]), where="post", color=colour, label=label, linestyle=dashes)
        longest = max(longest, curve.times.max(initial=0))
        end = max(end, curve.end)
    axes.set(xlim=(0, min(max(10, 2 * longest), end) if end > 0 else 1), ylim=(0, 1.04))
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set_title("Changed clients still waiting")
    axes.set_xlabel("ticks since the client's change")
    axes.legend(loc="upper right")
    whole_numbers(axes)
    return drawn


@styled
def policies(
    scores: Mapping[str, Sequence[Scores]],
    accuracy: Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]] | None = None,
    *,
    width: float = WIDE,
) -> Figure:
    """Policies side by side: accuracy over time, mean and range over seeds (ticks (T,), values (S, T)), and harm against cost."""
    looks = {name: (SERIES[i % len(SERIES)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(scores)}
    if not accuracy:
        drawn = figure(width, 3.1)
        _draw_costs(drawn.add_subplot(), scores, looks)
        return drawn
    drawn, (left, right) = _panels(width, 3.1)
    for name, (at, values) in accuracy.items():
        colour, dashes, _ = looks[name]
        smooth = np.array([_smoothed(row) for row in np.atleast_2d(values)])
        left.plot(at, smooth.mean(0), linestyle=dashes, color=colour, label=name)
        left.fill_between(at, smooth.min(0), smooth.max(0), color=colour, alpha=0.13, linewidth=0)
    left.set_ylim(0, 1.04)
    left.yaxis.set_major_formatter(_PERCENT)
    left.set_title("Accuracy of clients that change")
    left.set_xlabel("tick")
    left.legend(loc="lower left")
    whole_numbers(left)
    _draw_costs(right, scores, looks)
    return drawn


def _panels(width: float, height: float) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two panels beside each other, or one below the other where the page is narrow."""
    beside = width >= 6
    drawn = figure(width, height if beside else 2 * height)
    left, right = drawn.subplots(1, 2) if beside else drawn.subplots(2, 1)
    return drawn, (left, right)


def _smoothed(values: NDArray[np.float64], span: int = 5) -> NDArray[np.float64]:
    """Mean of the last ``span`` values: like the reader at that tick, it does not see ahead."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - span, 0)
    smooth: NDArray[np.float64] = (total[stop] - total[start]) / (stop - start)
    return smooth


def _ticks_of(events: Any, kind: str) -> NDArray[np.int64]:
    at: NDArray[np.int64] = column(events, "tick")[column(events, "kind") == kind]
    return at


def _draw_levels(axes: Axes, deployments: Any, names: NDArray[np.str_], order: NDArray[np.int64]) -> None:
    removed, device = column(deployments, "level"), column(deployments, "device")
    groups = [device == names[i] for i in order]
    values = np.unique(np.round(removed, 2))
    levels = values if len(values) <= len(LEVELS) else np.linspace(values[0], values[-1], len(LEVELS))
    nearest = np.abs(removed[:, None] - levels).argmin(1)
    start = np.zeros(len(groups))
    axes.set_title("Share of the model removed", pad=22)
    axes.set_yticks(range(len(groups)), [f"{names[i]} ({rows.sum()})" for i, rows in zip(order, groups, strict=True)])
    for i, level in enumerate(levels):
        part = np.array([np.mean(nearest[rows] == i) for rows in groups])
        colour = LEVELS[round(i * (len(LEVELS) - 1) / max(1, len(levels) - 1))]
        axes.barh(
            range(len(groups)), part, left=start, height=0.62, color=colour, edgecolor=PAPER, linewidth=0.8, label=f"{100 * level:.0f} %"
        )
        start += part
    bare(axes)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(groups) - 0.4))
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(levels), handlelength=0.9, columnspacing=1.0, handletextpad=0.4)


def _draw_device_accuracy(axes: Axes, ticks: Any, world: World, groups: Sequence[NDArray[np.int64]]) -> None:
    tick, client, accuracy = (column(ticks, name) for name in ("tick", "client", "accuracy"))
    start = tick.max() + 1 if world.first_change == NEVER else world.first_change
    spans = (
        ("before a change", tick < start, GREY, "o"),
        ("after", tick >= start, RED, "v"),
        ("last fifth", tick > 0.8 * tick.max(), GREEN, "D"),
    )
    for i, (label, rows, colour, marker) in enumerate(spans):
        means = [by_tick(np.zeros_like(tick), accuracy, rows & np.isin(client, members))[1] for members in groups]
        at = [(mean[0], row + 0.2 - 0.2 * i) for row, mean in enumerate(means) if len(mean)]
        x, y = np.array(at).reshape(-1, 2).T
        axes.scatter(x, y, color=colour, marker=marker, s=30, linewidths=0, label=label, zorder=3)
    axes.set_title("Accuracy while serving", pad=22)
    axes.hlines(np.arange(len(groups) - 1) + 0.5, 0, 1, color=GRID, linewidth=0.7, zorder=0)
    bare(axes)
    axes.grid(True, axis="x")
    axes.set(xlim=(0, 1.02), ylim=(-0.6, len(groups) - 0.4))
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, handletextpad=0.0, columnspacing=0.5)


def _mark_changes(all_axes: Sequence[Axes], labelled: Axes, world: World) -> None:
    starts = world.change[world.change != NEVER]
    if not len(starts):
        return
    first, last = int(starts.min()), int(starts.max())
    for axes in all_axes:
        axes.axvspan(first, max(last, first + 0.3), color=RED, alpha=0.13, linewidth=0, zorder=0)
        axes.axvline(first, color=RED, linewidth=0.8, zorder=0)
    text = f"{len(starts)} clients change" if first == last else f"{len(starts)} clients change, ticks {first} to {last}"
    labelled.annotate(
        text, (first, 0.98), (-4, 0), xycoords=("data", "axes fraction"), textcoords="offset points", ha="right", va="top", color=RED
    )


def _draw_counts(axes: Axes, at: NDArray[np.int64], colour: str, label: str) -> None:
    values, counts = np.unique(at, return_counts=True)
    axes.bar(values, counts, width=1.0, color=colour, linewidth=0)
    axes.set_title(f"{label}: {len(at):,}", fontsize=8.5, pad=2, fontweight="normal")
    axes.set_ylim(0, max(1, counts.max(initial=1)) * 1.05)
    axes.set_yticks([0, int(counts.max(initial=1))])
    axes.grid(False)


def _rows_to_show(world: World, touched: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the clients that change and of those with events, earliest change first; at most ``_ROWS``, spread evenly."""
    told = np.flatnonzero((world.change != NEVER) | np.isin(world.clients, touched))
    told = told[np.argsort(world.change[told], kind="stable")]
    return told if len(told) <= _ROWS else told[np.linspace(0, len(told) - 1, _ROWS).astype(np.int64)]


def _draw_costs(axes: Axes, scores: Mapping[str, Sequence[Scores]], looks: Mapping[str, tuple[str, Any, str]]) -> None:
    harms = {name: float(np.mean([s.harm for s in runs])) for name, runs in scores.items()}
    for name, runs in scores.items():
        colour, _, marker = looks[name]
        cost = float(np.mean([s.worker_seconds for s in runs]))
        axes.scatter([s.worker_seconds for s in runs], [s.harm for s in runs], s=10, color=colour, alpha=0.45, linewidths=0)
        axes.scatter([cost], [harms[name]], s=58, marker=marker, color=colour, edgecolor=PAPER, linewidth=0.7, zorder=3)
        below = harms[name] == min(harms.values())  # away from the label of the next better policy
        axes.annotate(name, (cost, harms[name]), (6, -11 if below else 5), textcoords="offset points", color=INK)
    axes.set_title("Harm, nats, against cost")
    axes.set_xlabel("worker seconds")
    axes.margins(0.16, 0.12)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
