"""What crosses between processes: which part of a value cannot, and exceptions with the chain of their causes, which pickling would drop."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from fedsim.errors import WorkerError

Pickle = Callable[[Any], bytes]
_MOST_CAUSES = 8


def unsendable(value: Any, name: str, pickle: Pickle, error: Exception) -> TypeError:
    """The error for a ``value`` that does not pickle, naming the attribute or entry at fault by its path from ``name``."""
    path, culprit = _culprit(value, name, pickle)
    kind = type(culprit)
    return TypeError(f"{path}, a {kind.__module__}.{kind.__qualname__}, cannot be sent to a worker ({str(error).splitlines()[0]})")


def sendable(error: BaseException, pickle: Pickle) -> tuple[BaseException, ...]:
    """The exception and its causes, outermost first; one that does not pickle is named by a ``WorkerError`` instead."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and len(chain) < _MOST_CAUSES:
        chain.append(current if _pickles(current, pickle) else WorkerError(f"stage run: {type(current).__qualname__}: {current}"))
        current = current.__cause__
    return tuple(chain)


def chained(errors: tuple[BaseException, ...]) -> BaseException:
    """Inverse of :func:`sendable`."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def last_lines(error: BaseException, only_errors: bool) -> str:
    """The end of a long text, on one line; with ``only_errors`` the lines that name one, and the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if only_errors and any("Error" in line for line in lines):
        lines = [line for line in lines if "Error" in line] + lines[-1:]
    return " | ".join(lines[-4:])[-400:]


def _culprit(value: Any, path: str, pickle: Pickle) -> tuple[str, Any]:
    """The deepest part of ``value`` that does not pickle."""
    if isinstance(value, Mapping):
        parts = [(f"{path}[{k!r}]", v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    else:
        parts = [(f"{path}.{k}", v) for k, v in getattr(value, "__dict__", {}).items()]
    for where, part in parts:
        if not _pickles(part, pickle):
            return _culprit(part, where, pickle)
    return path, value


def _pickles(value: Any, pickle: Pickle) -> bool:
    try:
        pickle(value)
    except Exception:
        return False
    return True
