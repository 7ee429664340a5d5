"""Files that are complete or absent, and the lock that keeps a second driver out of a run."""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedsim.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill ``path``: temporary file, flush to disk, rename. A full disk is a ``CheckpointError``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise CheckpointError(
            f"cannot write {path}: {reason}; what was stored before is untouched, resume when this is repaired"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Inverse of :func:`write_json`; ``CheckpointError`` for a missing or damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {path.parent} is not a run directory, or was not written whole") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class Driver:
    """A process: its host, its id, and when it started, because ids are used again (0 where the system does not tell)."""

    host: str
    pid: int
    started: int

    @classmethod
    def current(cls) -> "Driver":
        return cls(platform.node(), os.getpid(), _start_time(os.getpid()))

    def may_be_alive(self) -> bool:
        """Whether it may still run; a process of another host cannot be asked, so it counts as alive."""
        if self.host != platform.node():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return _start_time(self.pid) == self.started


def lock(path: Path) -> None:
    """Take the lock file ``path``. A lock left by a process of this host that is gone is taken over.

    Raises ``CheckpointError`` while another driver (or this one, a second time) may hold it.
    """
    mine = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_json(mine, asdict(Driver.current()))
    try:
        while not _linked(mine, path):
            holder = lock_holder(path)
            if holder and holder.may_be_alive():
                raise CheckpointError(
                    f"{path.parent} is in use by process {holder.pid} on {holder.host}; wait for it, or delete {path} if that process is gone"
                )
            if holder:
                _set_aside(path, holder)
    finally:
        mine.unlink(missing_ok=True)


def _set_aside(path: Path, stale: Driver) -> None:
    """Remove the lock that ``stale`` left. Of several who try, a rename lets one succeed; a lock taken meanwhile is put back."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.stale.partial")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    try:
        if lock_holder(aside) != stale:
            _linked(aside, path)
    finally:
        aside.unlink()


def unlock(path: Path) -> None:
    """Give back a lock taken by this process."""
    if lock_holder(path) == Driver.current():
        path.unlink(missing_ok=True)


def lock_holder(path: Path) -> Driver | None:
    """Who holds the lock file ``path``; ``None`` when nobody does."""
    if not path.exists():
        return None
    try:
        return Driver(**read_json(path))
    except TypeError as error:
        raise CheckpointError(f"{path} is not a lock file; delete it if no process uses the run") from error


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)  # fails when the target exists: taking the lock and writing it are one step
    except FileExistsError:
        return False
    return True


def _start_time(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
