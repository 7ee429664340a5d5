"""A run, or a comparison of policies, told on one page: the numbers first, then what happened, in order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedsim.errors import CheckpointError
from fedsim.runs import html, plots, style
from fedsim.runs.configuration import expression
from fedsim.runs.files import write_atomically
from fedsim.runs.run import Run, rate
from fedsim.runs.schema import column
from fedsim.runs.scores import Scores
from fedsim.runs.text import aligned, duration, number, plural, share, size

_EVENTS = 300
_FIGURES_OF_MERIT: tuple[tuple[str, Callable[[Scores], float], Callable[[float], str]], ...] = (
    ("accuracy of changed clients, before", lambda s: s.accuracy_before, share),
    ("… after", lambda s: s.accuracy_after, share),
    ("… at the end", lambda s: s.accuracy_end, share),
    ("delay, median (ticks)", lambda s: s.median_delay, number),
    ("misses", lambda s: s.misses, number),
    ("false alarms", lambda s: s.false_alarms, number),
    ("actions asked for", lambda s: s.asked, number),
    ("refused by the gate", lambda s: s.rejected, number),
    ("MB moved in training", lambda s: s.bytes_train / 1e6, number),
    ("MB moved to deploy", lambda s: s.bytes_deploy / 1e6, number),
    ("MB moved to redeploy", lambda s: s.megabytes_redeploy, number),
    ("worker seconds", lambda s: s.worker_seconds, number),
    ("harm (nats)", lambda s: s.harm, number),
)


def write_report(run: Run) -> Path:
    """Draw ``figures/`` and write ``report.html`` in the run directory; the path of the page."""
    rounds, deployments, ticks, events, truth = run.rounds(), run.deployments(), run.ticks(), run.events(), run.truth()
    figures, scores, config = _Figures(run.path / "figures"), run.scores(), run.config()
    chapters = [
        ("Train", _train(rounds, figures) if len(rounds) else ()),
        ("Deploy", _deploy(deployments, ticks, truth, figures) if len(deployments) else ()),
        ("Watch", _watch(ticks, events, truth, scores, figures) if len(ticks) else ()),
        ("React", _react(ticks, events, truth, scores, figures) if len(ticks) and len(events) else ()),
    ]
    told = [html.section(i, title, *parts) for i, (title, parts) in enumerate(((t, p) for t, p in chapters if p), start=1)]
    page = html.page(
        run.name,
        html.paragraph(_story(rounds, scores), lead=True),
        html.tiles(_headlines(rounds, scores)),
        *told,
        html.folded("Configuration", expression(config["simulation"])),
        html.folded("Environment", _environment(run.environment())),
        *([html.folded("Events", _event_list(events))] if len(events) else []),
        html.footer(f"Run {run.status()}. Configuration {config['digest']}, tables {run.digest()}: equal fingerprints mean equal results."),
    )
    return _write(run.path / "report.html", page)


def comparison_report(
    results: Mapping[str, Sequence[Scores]],
    path: str | Path,
    *,
    accuracy: Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]] | None = None,
    details: Mapping[str, str] | None = None,
    title: str = "Policies side by side",
) -> Path:
    """Write one page that compares policies, each with one ``Scores`` a seed; figures go to ``figures/`` beside ``path``.

    ``accuracy``: for each policy its ticks (T,) and accuracies (S, T), see :func:`fedsim.runs.scores.accuracy_over_time`.
    ``details``: text shown behind a click, by title.
    """
    if not results or not all(results.values()):
        raise ValueError(
            f"a comparison needs at least one policy, each with at least one seed, got { {k: len(v) for k, v in results.items()} }"
        )
    path = Path(path)
    figures = _Figures(path.parent / "figures")
    rows = [[label, *(_spread([get(s) for s in scores], show) for scores in results.values())] for label, get, show in _FIGURES_OF_MERIT]
    page = html.page(
        title,
        html.paragraph(_verdict(results), lead=True),
        html.tiles([_policy_tile(name, scores) for name, scores in results.items()]),
        figures.draw(
            "policies",
            lambda width: plots.policies(results, accuracy, width=width),
            "Every policy met the same streams, drawn with the same numbers. Lines are means over seeds, bands their range; small marks are seeds, "
            "large ones means. Harm is loss above the dense model's, summed over clients and ticks from the first change on.",
        ),
        html.table(["mean ± standard deviation over seeds", *results], rows),
        *(html.folded(label, text) for label, text in (details or {}).items()),
    )
    return _write(path, page)


class _Figures:
    """Draws every figure for both page widths, and keeps the wide one as a PNG for use elsewhere."""

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {directory}: {error.strerror or error}") from error

    def draw(self, name: str, plot: Callable[[float], Figure], caption: str) -> str:
        wide, narrow = (style.settled(plot(width)) for width in (style.WIDE, style.NARROW))
        image = style.png(wide)
        write_atomically(self.directory / f"{name}.png", lambda file: file.write(image))
        return html.picture(style.svg(wide, f"{name}-wide"), style.svg(narrow, f"{name}-narrow"), caption)


def _story(rounds: Any, scores: Scores) -> str:
    parts = []
    if len(rounds):
        moved = f"{size(scores.bytes_train)} crossed the links"
        parts.append(
            f"The fleet trained for {plural(len(rounds), 'round')}; {moved} and test accuracy ended at {share(scores.test_accuracy)}."
        )
    if scores.num_ticks and not scores.num_changed:
        parts.append(
            f"{plural(scores.num_clients, 'client')} then served for {plural(scores.num_ticks, 'tick')} in a world that did not change."
        )
    if scores.num_changed:
        parts.append(
            f"{plural(scores.num_clients, 'client')} then served for {plural(scores.num_ticks, 'tick')}, and the world of {scores.num_changed:,} changed. "
            f"They were right {share(scores.accuracy_before)} of the time before their change and {share(scores.accuracy_end)} at the end; "
            f"the whole model, not pruned, would have been right {share(scores.dense_end)} of the time there."
        )
    return " ".join(parts) or "Nothing has been recorded yet."


def _headlines(rounds: Any, scores: Scores) -> list[tuple[str, str, str]]:
    told = []
    if scores.num_changed:
        told.append(
            ("Accuracy", f"{share(scores.accuracy_before)} → {share(scores.accuracy_end)}", "clients that change: before, and at the end")
        )
        found = f"{scores.detected} of {scores.num_changed} changes raised an alarm"
        told.append(("Detection delay", f"{number(scores.median_delay)} ticks", f"median; {found}"))
    elif len(rounds):
        told.append(("Test accuracy", share(scores.test_accuracy), "of the trained model"))
    if scores.num_ticks:
        interval = f"95 % interval {number(scores.false_alarm_low, 2)} to {number(scores.false_alarm_high, 2)}"
        told.append(("False alarms", number(scores.false_alarm_rate, 2), f"per 1,000 watched client-ticks without change; {interval}"))
        told.append(("Redeployments", f"{scores.redeployed:,}", f"{scores.asked:,} asked for, {scores.rejected:,} refused by the gate"))
        told.append(("Harm", f"{number(scores.harm)} nats", "loss above the dense model's, all clients, from the first change on"))
    deploy = f"; {size(scores.bytes_deploy)} to deploy" if scores.bytes_deploy else ""
    redeploy = f"; {size(scores.bytes_redeploy)} to redeploy" if scores.num_ticks else ""
    moved = size(scores.bytes_train + scores.bytes_deploy + scores.bytes_redeploy)
    told.append(("Bytes moved", moved, f"{size(scores.bytes_train)} to train{deploy}{redeploy}"))
    return told


def _train(rounds: Any, figures: _Figures) -> tuple[str, ...]:
    up, down, clock = column(rounds, "bytes_up").sum(), column(rounds, "bytes_down").sum(), column(rounds, "clock")[-1]
    rows = [
        [
            f"{len(rounds):,}",
            f"{column(rounds, 'uploads').sum():,}",
            size(up),
            size(down),
            duration(clock),
            number(column(rounds, "train_loss")[-1]),
        ]
    ]
    return (
        html.paragraph(f"Clients sent {size(up)} and received {size(down)} in {duration(clock)} of simulated time."),
        figures.draw(
            "training",
            lambda width: plots.training(rounds, width=width),
            "Accuracy on held-out examples, and bytes summed over clients, by round.",
        ),
        html.table(["rounds", "uploads", "sent", "received", "simulated time", "last train loss"], rows),
    )


def _deploy(deployments: Any, ticks: Any, truth: Any, figures: _Figures) -> tuple[str, ...]:
    device, removed = column(deployments, "device"), column(deployments, "sparsity")
    rows = []
    for name in np.unique(device):
        own = device == name
        sizes, parameters = column(deployments, "bytes")[own], column(deployments, "parameters")[own]
        rows.append([str(name), f"{own.sum():,}", share(removed[own].mean()), number(parameters.mean()), size(sizes.mean())])
    return (
        html.paragraph(
            f"Each client serves the largest submodel its device can hold; on average {share(removed.mean())} of the model is removed."
        ),
        figures.draw(
            "devices",
            lambda width: plots.devices(deployments, ticks, truth, width=width),
            "For each device class, with its number of clients: how much of the model they do without, and how often they are right.",
        ),
        html.table(["device", "clients", "removed", "parameters", "size"], rows),
    )


def _watch(ticks: Any, events: Any, truth: Any, scores: Scores, figures: _Figures) -> tuple[str, ...]:
    names = (("clients that change", "accuracy"), ("the same, dense model", "dense"), ("all clients", "fleet"))
    rows = [[label, *(share(getattr(scores, f"{key}_{when}")) for when in ("before", "after", "end"))] for label, key in names]
    found = f"Half of the changes were noticed within {number(scores.median_delay)} ticks. " if np.isfinite(scores.median_delay) else ""
    false = f"Without a change, an alarm rang {rate(scores)} times per 1,000 watched client-ticks."
    return (
        html.paragraph(f"{found}{false}"),
        figures.draw(
            "loss",
            lambda width: plots.fleet_loss(ticks, events, truth, width=width),
            "Loss before any reaction of that tick; thin lines are ticks, thick ones the mean of the last five. Red marks when the world truly changes, "
            "which neither detector nor policy is told.",
        ),
        html.table(["accuracy", "before", "after", "at the end"], rows),
    )


def _react(ticks: Any, events: Any, truth: Any, scores: Scores, figures: _Figures) -> tuple[str, ...]:
    tables = {"ticks": ticks, "events": events, "truth": truth}
    asked = f"The policy asked for {plural(scores.asked, 'action')}; {scores.redeployed:,} went into service and {scores.rejected:,} were refused because"
    parts = [
        html.paragraph(
            f"{asked} the candidate did not beat what was deployed. Workers were busy for {duration(scores.worker_seconds)} of simulated time."
        )
    ]
    caption = "Clients that changed, or to which something happened, earliest change on top; shaded from their change on."
    parts.append(figures.draw("events", lambda width: plots.raster(**tables, width=width), caption))
    if scores.num_changed:
        caption = "How long changed clients waited; those lost sight of before are accounted for (Kaplan-Meier)."
        parts.append(figures.draw("delays", lambda width: plots.delays(**tables, width=width), caption))
    rows = [
        ["changes detected / missed", f"{scores.detected:,} / {scores.misses:,}"],
        ["alarms repeated for one change", f"{scores.repeats:,}"],
        ["false alarms", f"{scores.false_alarms:,}"],
        ["ticks from change to repair (median)", number(scores.median_repair)],
        ["redeployments that helped", share(scores.precision)],
        ["moved to redeploy", size(scores.bytes_redeploy)],
        ["harm, where loss exceeds the dense model's", f"{number(scores.harm_positive)} nats"],
        ["harm to the clients that change", f"{number(scores.harm_changed)} nats"],
    ]
    return (*parts, html.table(["", ""], rows))


def _verdict(results: Mapping[str, Sequence[Scores]]) -> str:
    harm = {name: float(np.mean([s.harm for s in scores])) for name, scores in results.items()}
    ranked = sorted((value, name) for name, value in harm.items() if np.isfinite(value))
    seeds = max(len(scores) for scores in results.values())
    start = f"{plural(len(results), 'policy').replace('policys', 'policies')} in the same worlds, {plural(seeds, 'seed')}."
    if len(ranked) < 2:
        return start
    (least, best), (most, worst) = ranked[0], ranked[-1]
    return f"{start} Least harm: {best}, {number(least)} nats. Most: {worst}, {number(most)} nats."


def _policy_tile(name: str, scores: Sequence[Scores]) -> tuple[str, str, str]:
    end = _spread([s.accuracy_end for s in scores], share)
    harm = number(float(np.mean([s.harm for s in scores])))
    return name, end, f"right at the end; harm {harm} nats, {plural(round(np.mean([s.redeployed for s in scores])), 'redeployment')}"


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    finite = [value for value in values if np.isfinite(value)]
    mean = show(float(np.mean(finite)) if finite else float("nan"))
    if len(finite) < 2:
        return mean
    deviation = float(np.std(finite, ddof=1))
    return f"{mean} ± {number(deviation, 2) if show is number else show(deviation)}"


def _environment(environment: Mapping[str, Any]) -> str:
    packages = environment["packages"]
    rows = [[key, str(value)] for key, value in environment.items() if key != "packages"]
    return aligned(["", ""], rows + [[name, str(version)] for name, version in packages.items()]).lstrip("\n")


def _event_list(events: Any) -> str:
    names = ("tick", "client", "kind", "detail", "job", "bytes")
    rows = list(zip(*(map(str, column(events, name)[:_EVENTS].tolist()) for name in names), strict=True))
    more = f"\n… {len(events) - _EVENTS:,} more in the events table" if len(events) > _EVENTS else ""
    return aligned(names, rows) + more


def _write(path: Path, page: str) -> Path:
    write_atomically(path, lambda file: file.write(page.encode()))
    return path
