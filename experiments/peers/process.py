"""Engines as processes of their own: seconds from start to end, and the peak of the memory of all their processes."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

from experiments.peers.job import Job


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Wall-clock seconds of the ``whole`` process and of each round, peak ``memory`` in bytes (proportional set sizes), and the test loss."""

    whole: float
    rounds: tuple[float, ...]
    memory: int
    loss: float

    @property
    def start(self) -> float:
        """Seconds outside the rounds: imports, workers, data, and the end."""
        return self.whole - sum(self.rounds)

    @property
    def steady(self) -> float:
        """Median seconds of the rounds after the first."""
        return median(self.rounds[1:])


def engine(name: str, job: Job, rounds: int) -> Ended:
    """An engine of :mod:`experiments.peers.whole`, or "flower"."""
    module = ["flower"] if name == "flower" else ["whole", name]
    return run([sys.executable, "-m", f"experiments.peers.{module[0]}", *module[1:], job.name, str(rounds)])


def run(command: Sequence[str]) -> Ended:
    """A command that is given one more argument, the file to write its rounds' ``seconds`` and its ``loss`` to. ``RuntimeError`` with its last words if it fails."""
    with TemporaryDirectory() as scratch:
        found, said = Path(scratch) / "found.json", Path(scratch) / "said"
        with said.open("w") as output:
            start = time.perf_counter()
            process = subprocess.Popen([*command, str(found)], stdout=output, stderr=output)
            peak = 0
            while process.poll() is None:
                peak = max(peak, _memory(process.pid))
                time.sleep(0.1)
            whole = time.perf_counter() - start
        if process.returncode or not found.exists():
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said.read_text()[-500:]}")
        result = json.loads(found.read_text())
    return Ended(whole=whole, rounds=tuple(result["seconds"]), memory=peak, loss=result["loss"])


def _memory(pid: int) -> int:
    """Proportional memory of a process and its children, in bytes."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # one of them ended meanwhile
        pass
    return total
