"""A run is a directory: a readable config, Parquet part files that are only ever added, and checkpoints.

Every file appears whole by a rename, so a killed driver leaves a directory that can be resumed. Part files of a stage
carry the index of the round or tick they end with; on resume the parts past the last checkpoint are dropped and written anew.
"""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from numpy.typing import ArrayLike

from fedsim import encoding
from fedsim.errors import CheckpointError
from fedsim.runs import files
from fedsim.runs.schema import arrow_table, empty_table

_PACKAGES = ("fedsim", "numpy", "scipy", "torch", "ray", "pyarrow", "flwr", "transformers", "scikit-learn")
_KEPT = 2


def run_directory(out: str | Path, simulation: Any) -> Path:
    """Where a run of ``simulation`` is stored under ``out``: ``<short name>-<first 8 characters of its digest>``."""
    name = getattr(simulation, "name", "") or type(getattr(simulation, "task", simulation)).__name__
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    return Path(out) / f"{slug[:40].rstrip('-')}-{encoding.digest(simulation)[:8]}"


class RunStore:
    """A run directory on disk. :meth:`create` locks it for writing; :meth:`open` reads, and writes after :meth:`lock`.

    ``trusted`` names the packages whose classes may be rebuilt from stored values, beside fedsim's own: those of the
    user's tasks and methods.
    """

    def __init__(self, path: Path, *, trusted: tuple[str, ...] = ()):
        self.path = path
        self.trusted = ("fedsim", "detection", *trusted)

    @property
    def client_directory(self) -> Path:
        """Where clients' states lie between rounds, for strategies that keep any."""
        return self.path / "clients"

    @classmethod
    def create(cls, out: str | Path, simulation: Any, *, recipe: str | None = None, trusted: tuple[str, ...] = ()) -> "RunStore":
        """The locked directory of ``simulation`` under ``out``: a new one, or the one a killed run left.

        Raises ``CheckpointError`` where the directory holds another simulation, something else, or another driver.
        """
        store = cls(run_directory(out, simulation), trusted=trusted)
        store._make_directories()
        store.lock()
        try:
            store._write_config(simulation, recipe)
        except BaseException:
            store.release()
            raise
        return store

    @classmethod
    def open(cls, path: str | Path, *, trusted: tuple[str, ...] = ()) -> "RunStore":
        """An existing run directory. Raises ``CheckpointError`` for anything else."""
        store = cls(Path(path), trusted=trusted)
        if not store.path.is_dir():
            raise CheckpointError(f"no run directory at {path}")
        store.config()
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def lock(self) -> None:
        """Become the one driver of this run; ``CheckpointError`` while another one may be alive."""
        files.lock(self.path / "lock.json")
        (self.path / "checkpoints").mkdir(exist_ok=True)  # a copy may have left out an empty folder

    def release(self) -> None:
        """Let another driver in."""
        files.unlock(self.path / "lock.json")

    def config(self) -> dict[str, Any]:
        """``config.json``: ``simulation`` (an encoding tree), its ``digest`` and the ``recipe`` it came from, if any."""
        config = files.read_json(self.path / "config.json")
        if not isinstance(config, dict) or not {"simulation", "digest", "recipe"} <= set(config):
            raise CheckpointError(f"{self.path / 'config.json'} is damaged or not written by fedsim")
        return config

    def environment(self) -> dict[str, Any]:
        """Python, packages, machine and seed of the process that created the run."""
        environment: dict[str, Any] = files.read_json(self.path / "environment.json")
        return environment

    def simulation(self) -> Any:
        """The Simulation, rebuilt. ``CheckpointError`` when config.json was edited, or was written by another version."""
        config = self.config()
        arrays = self.path / "config-arrays.npz"
        simulation = encoding.decode(config["simulation"], encoding.load(arrays) if arrays.exists() else {}, trusted=self.trusted)
        if encoding.digest(simulation) != config["digest"]:
            raise CheckpointError(
                f"{self.path / 'config.json'} was edited or written by another version of fedsim; its digest does not match"
            )
        return simulation

    def write_part(self, table: str, index: int, columns: Mapping[str, ArrayLike]) -> None:
        """Add (or write again) the rows of part ``index`` of ``table``; see ``fedsim.runs.schema`` for the columns."""
        assert self._locked(), "only the driver that holds the lock writes"
        import pyarrow.parquet as pq

        rows = arrow_table(table, columns)
        files.write_atomically(self._part(table, index), lambda file: pq.write_table(rows, file))

    def drop_parts_after(self, table: str, index: int) -> None:
        """Remove the parts of ``table`` with an index above ``index``: a resumed run writes them again."""
        assert self._locked(), "only the driver that holds the lock writes"
        for number, path in self._parts(table):
            if number > index:
                path.unlink()

    def table(self, name: str) -> Any:
        """All rows of table ``name``, parts in index order; without rows where nothing was written yet."""
        return pa.concat_tables([empty_table(name), *(_read(path) for _, path in self._parts(name))])

    def save_checkpoint(self, stage: str, index: int, state: Any, *, keep: bool = False) -> None:
        """Store ``state`` of ``stage`` after ``index``. The last two stay, and those saved with ``keep``."""
        assert self._locked(), "only the driver that holds the lock writes"
        encoding.save(self.path / "checkpoints" / f"{stage}-{index:06d}{'.keep' if keep else ''}.npz", state)
        passing = [path for _, path in self._checkpoints(stage) if not path.name.endswith(".keep.npz")]
        for path in passing[:-_KEPT]:
            path.unlink()

    def checkpoints(self, stage: str) -> list[int]:
        """Indices of the stored checkpoints of ``stage``, ascending."""
        return [index for index, _ in self._checkpoints(stage)]

    def checkpoint(self, stage: str, index: int) -> Any:
        """The state stored after ``index``. ``CheckpointError`` when it is damaged or absent."""
        found = dict(self._checkpoints(stage))
        if index not in found:
            raise CheckpointError(f"{self.path} has no checkpoint of stage {stage!r} at {index}, only at {sorted(found)}")
        try:
            return encoding.load(found[index], trusted=self.trusted)
        except CheckpointError as error:
            before = [i for i in found if i < index]
            way = f"continue from {max(before)}" if before else "begin the stage again"
            raise CheckpointError(f"{error}; delete {found[index]} to {way}") from error

    def latest_checkpoint(self, stage: str) -> tuple[int, Any] | None:
        """Index and state of the last checkpoint of ``stage``, or ``None``. A damaged one raises ``CheckpointError``."""
        indices = self.checkpoints(stage)
        return (indices[-1], self.checkpoint(stage, indices[-1])) if indices else None

    def mark_complete(self) -> None:
        """Note that every stage has ended."""
        assert self._locked(), "only the driver that holds the lock writes"
        files.write_json(self.path / "complete.json", {"digest": self.config()["digest"]})

    def status(self) -> str:
        """``complete``, ``running`` (a driver may be alive) or ``interrupted`` (resume continues it)."""
        if (self.path / "complete.json").exists():
            return "complete"
        holder = files.lock_holder(self.path / "lock.json")
        return "running" if holder and holder.may_be_alive() else "interrupted"

    def _make_directories(self) -> None:
        foreign = self.path.is_dir() and any(self.path.iterdir()) and not self._ours()
        if foreign or (self.path.exists() and not self.path.is_dir()):
            raise CheckpointError(f"{self.path} exists and is not a run directory; choose another place for the run")
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {self.path}: {error.strerror or error}") from error

    def _ours(self) -> bool:
        """A run directory, or what a driver killed before it wrote config.json leaves behind."""
        names = {path.name for path in self.path.iterdir() if not path.name.endswith(".partial")}
        return "config.json" in names or names <= {"checkpoints", "lock.json", "environment.json", "config-arrays.npz"}

    def _write_config(self, simulation: Any, recipe: str | None) -> None:
        digest = encoding.digest(simulation)
        if (self.path / "config.json").exists():
            stored = self.config()["digest"]
            if stored != digest:
                raise CheckpointError(
                    f"{self.path} holds another simulation (digest {stored}, not {digest}); choose another place for the run"
                )
            return
        tree, arrays = encoding.encode(simulation)
        if arrays:
            encoding.save(self.path / "config-arrays.npz", arrays)
        files.write_json(self.path / "environment.json", _environment(simulation))
        files.write_json(self.path / "config.json", {"digest": digest, "recipe": recipe, "simulation": tree})

    def _locked(self) -> bool:
        return files.lock_holder(self.path / "lock.json") == files.Driver.current()

    def _part(self, table: str, index: int) -> Path:
        if index < 0:
            raise ValueError(f"index of a part must be at least 0, got {index}")
        return self.path / f"{table}-{index:06d}.parquet"

    def _parts(self, table: str) -> list[tuple[int, Path]]:
        return _numbered(self.path, rf"{table}-(\d+)\.parquet")

    def _checkpoints(self, stage: str) -> list[tuple[int, Path]]:
        return _numbered(self.path / "checkpoints", rf"{re.escape(stage)}-(\d+)(?:\.keep)?\.npz")


def _numbered(directory: Path, pattern: str) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(pattern, path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _read(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _environment(simulation: Any) -> dict[str, Any]:
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "seed": getattr(simulation, "seed", None),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
