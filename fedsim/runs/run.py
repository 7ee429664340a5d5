"""A stored run, as ``fs.simulate`` returns it: tables, scores, a summary and a report."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import encoding
from fedsim.errors import FedsimError
from fedsim.runs.schema import SCHEMAS, column
from fedsim.runs.scores import Scores, score
from fedsim.runs.store import RunStore
from fedsim.runs.text import aligned, duration, number, plural, share, size


class Run:
    """The run stored at ``path``. Raises ``CheckpointError`` when there is none.

    ``simulation`` is the value it was made from, where the caller still has it; else it is rebuilt from config.json,
    which needs the packages of a user's own classes among ``trusted``.
    """

    def __init__(self, path: str | Path, *, simulation: Any = None, trusted: tuple[str, ...] = ()):
        self._store = RunStore.open(path, trusted=trusted)
        if simulation is not None:
            self.__dict__["simulation"] = simulation

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status()})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._store.path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def recipe(self) -> str | None:
        """The recipe the run was started from, where it was."""
        recipe: str | None = self._store.config()["recipe"]
        return recipe

    @cached_property
    def simulation(self) -> Any:
        """The Simulation of this run."""
        return self._store.simulation()

    def config(self) -> dict[str, Any]:
        """What config.json holds, as stored."""
        return self._store.config()

    def environment(self) -> dict[str, Any]:
        """What environment.json holds."""
        return self._store.environment()

    def status(self) -> str:
        """``complete``, ``running`` or ``interrupted``."""
        return self._store.status()

    def rounds(self) -> Any:
        """One row per federated round."""
        return self._store.table("rounds")

    def clients(self) -> Any:
        """One row per round and client of its cohort."""
        return self._store.table("clients")

    def deployments(self) -> Any:
        """One row per client: its device, its level and the size of its submodel."""
        return self._store.table("deployments")

    def truth(self) -> Any:
        """True change points; ``change_at`` is -1 for clients that never change. Neither policy nor detector saw it."""
        return self._store.table("truth")

    def ticks(self) -> Any:
        """One row per tick and active client."""
        return self._store.table("ticks")

    def events(self) -> Any:
        """Alarms, requests, starts, redeployments and rejections."""
        return self._store.table("events")

    def scores(self) -> Scores:
        """What the run was worth."""
        tables = {name: self._store.table(name) for name in ("rounds", "ticks", "events", "truth", "deployments")}
        return score(**tables)

    def digest(self) -> str:
        """Fingerprint of all tables (32 hexadecimal characters): equal for equal rows, however they were cut into part files."""
        tables = {name: self._store.table(name) for name in SCHEMAS}
        return encoding.digest(
            {name: {key: _canonical(column(table, key)) for key in table.column_names} for name, table in tables.items()}
        )

    def summary(self) -> str:
        """The run in a few small text tables."""
        parts = [f"{self.name} ({self.status()})", _training(self.rounds()), _deployment(self.deployments())]
        scores = self.scores()
        if scores.num_ticks:
            parts += [_serving(scores), _reaction(scores)]
        return "\n\n".join(part for part in parts if part)

    def report(self) -> Path:
        """Write ``figures/`` and ``report.html`` into the run directory; the path of the page. Needs matplotlib."""
        with needing_matplotlib():
            from fedsim.runs.report import write_report
        return write_report(self)


@contextmanager
def needing_matplotlib() -> Iterator[None]:
    """Where it is not installed, importing it inside is a ``FedsimError`` that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise FedsimError("a report needs matplotlib: pip install 'fedsim[plots]'") from error


def _canonical(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One bit pattern for ``nan`` and one width for text, so that only content tells tables apart."""
    if values.dtype.kind == "f":
        return np.where(np.isnan(values), np.nan, values)
    if values.dtype.kind == "U":
        return np.frombuffer("\0".join(values.tolist()).encode(), np.uint8)
    return values


def _training(rounds: Any) -> str:
    if not len(rounds):
        return ""
    accuracy, clock = column(rounds, "test_accuracy"), column(rounds, "clock")
    tested = accuracy[np.isfinite(accuracy)]
    cells = [
        f"{len(rounds):,}",
        share(tested[-1]) if len(tested) else "–",
        number(column(rounds, "train_loss")[-1]),
        size(column(rounds, "bytes_up").sum()),
        size(column(rounds, "bytes_down").sum()),
        duration(clock[-1]),
    ]
    return aligned(["rounds", "test accuracy", "train loss", "sent", "received", "simulated time"], [cells])


def _deployment(deployments: Any) -> str:
    if not len(deployments):
        return ""
    device = column(deployments, "device")
    rows = []
    for name in np.unique(device):
        part = {key: column(deployments, key)[device == name] for key in ("sparsity", "parameters", "bytes")}
        ends = dict.fromkeys((share(part["sparsity"].min()), share(part["sparsity"].max())))
        removed = " to ".join(ends)
        rows.append([str(name), f"{len(part['bytes']):,}", removed, number(part["parameters"].mean()), size(part["bytes"].mean())])
    return aligned(["device", "clients", "removed", "parameters (mean)", "size (mean)"], rows)


def _serving(scores: Scores) -> str:
    rows = [
        ["clients that change", share(scores.accuracy_before), share(scores.accuracy_after), share(scores.accuracy_end)],
        ["the same, dense model", share(scores.dense_before), share(scores.dense_after), share(scores.dense_end)],
        ["all clients", share(scores.fleet_before), share(scores.fleet_after), share(scores.fleet_end)],
    ]
    title = f"{plural(scores.num_clients, 'client')}, {plural(scores.num_ticks, 'tick')}, {scores.num_changed:,} change"
    return title + "\n" + aligned(["accuracy", "before", "after", "at the end"], rows)


def _reaction(scores: Scores) -> str:
    rows = [
        ["delay, median (ticks)", number(scores.median_delay)],
        ["detected / missed", f"{scores.detected} / {scores.misses}"],
        ["false alarms", f"{scores.false_alarms}"],
        ["  per 1,000 client-ticks", rate(scores)],
        ["re-prunes asked / deployed / refused", f"{scores.asked} / {scores.redeployed} / {scores.rejected}"],
        ["moved to train / deploy / redeploy", " / ".join(map(size, (scores.bytes_train, scores.bytes_deploy, scores.bytes_redeploy)))],
        ["worker time", duration(scores.worker_seconds)],
        ["harm (nats)", f"{number(scores.harm)}"],
    ]
    return aligned(["watching and reacting", ""], rows)


def rate(scores: Scores) -> str:
    """False alarms per 1,000 watched in-control client-ticks with their 95 % interval."""
    return f"{number(scores.false_alarm_rate, 2)} [{number(scores.false_alarm_low, 2)}, {number(scores.false_alarm_high, 2)}]"
