"""Progress bars of a run: one line a stage, on a terminal only."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from fedsim.records import Alarm, Record, Redeployment, Round

if TYPE_CHECKING:
    from fedsim.simulation import Simulation


class Progress:
    """Shows rounds and ticks as they finish; silent when ``shown`` is false or the output is not a terminal."""

    def __init__(self, simulation: "Simulation", *, shown: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = Bars(*columns, console=console, disable=not (shown and console.is_terminal))
        self._totals = {"train": simulation.rounds, "deploy": 1, "serve": simulation.serving.ticks}
        self._lines = {stage: self._bars.add_task(stage, total=total, note="", start=False) for stage, total in self._totals.items()}
        self._accuracy = float("nan")
        self._alarms = self._redeployments = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def begin(self, stage: str, done: int = 0) -> None:
        """``stage`` starts, or goes on after ``done`` steps of it."""
        self._bars.start_task(self._lines[stage])
        self._bars.update(self._lines[stage], completed=done)

    def advance(self, stage: str, done: int, records: tuple[Record, ...] = ()) -> None:
        """``done`` steps of ``stage`` are finished; ``records`` came with the last one."""
        for record in records:
            if isinstance(record, Round) and np.isfinite(record.test_accuracy):
                self._accuracy = record.test_accuracy
            self._alarms += isinstance(record, Alarm)
            self._redeployments += isinstance(record, Redeployment)
        notes = {
            "train": f"accuracy {self._accuracy:.1%}" if np.isfinite(self._accuracy) else "",
            "serve": f"{self._alarms:,} alarms, {self._redeployments:,} redeployments",
        }
        self._bars.update(self._lines[stage], completed=done, note=notes.get(stage, ""))
