"""States as values: a frozen dataclass of arrays whose leading dimension counts streams; parts may be states or tuples of states.

``mapped``, ``take`` and ``merged`` work on the arrays of any state; ``to_bytes`` and ``from_bytes`` store one without pickle.
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

S = TypeVar("S")
Mask = NDArray[np.bool_]
AnyArray = NDArray[Any]


def mapped(state: S, change: Callable[[AnyArray], AnyArray]) -> S:
    """``change`` applied to every array of ``state``."""
    changed: S = _combined(lambda column: change(column[0]), state)
    return changed


def take(state: S, rows: Any) -> S:
    """The streams ``rows`` (a mask, indices or a slice), in that order."""
    return mapped(state, lambda column: column[rows])


def merged(mask: Mask, new: S, old: S) -> S:
    """Streams of ``mask`` (N,) from ``new``, the others' bits from ``old``; both have the same shapes."""
    both: S = _combined(lambda columns: np.where(_aligned(mask, columns[0]), columns[0], columns[1]), new, old)
    return both


def columns(state: Any, name: str = "") -> Iterator[tuple[str, AnyArray]]:
    """Every array of ``state`` with its dotted name, in the order of the fields."""
    if isinstance(state, np.ndarray):
        yield name, state
    else:
        for part, value in _parts(state):
            yield from columns(value, f"{name}.{part}" if name else part)


def to_bytes(state: Any) -> bytes:
    """``state`` as the bytes of an npz file. Raises ``ValueError`` for a state that holds objects, as those of river's detectors do."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(columns(state))
    objects = [name for name, column in arrays.items() if column.dtype == object]
    if objects:
        raise ValueError(f"a state can be stored where it is made of numbers, but {', '.join(objects)} holds Python objects")
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def from_bytes(data: bytes, like: S) -> S:
    """The state stored in ``data``, of the structure and types of ``like`` (any number of streams).

    Raises ``ValueError`` for damaged bytes, and for those of another kind of state.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"data must hold the bytes of a stored state, but they are damaged: {error}") from error
    wanted = {name: (column.dtype, column.ndim) for name, column in columns(like)}
    given = {name: (column.dtype, column.ndim) for name, column in found.items()}
    if wanted != given:
        raise ValueError(f"data must hold a state of {sorted(wanted)}, got one of {sorted(given)} or with other types")
    if len({len(column) for column in found.values()}) > 1:
        raise ValueError("data must hold one number of streams, but its arrays differ in length")
    order = iter([found[name] for name, _ in columns(like)])
    return mapped(like, lambda _: next(order))


def _combined(change: Callable[[tuple[AnyArray, ...]], AnyArray], *states: Any) -> Any:
    first = states[0]
    if isinstance(first, np.ndarray):
        return change(states)
    values = [_combined(change, *parts) for parts in zip(*([value for _, value in _parts(s)] for s in states), strict=True)]
    if isinstance(first, tuple):
        return tuple(values)
    return type(first)(**{name: value for (name, _), value in zip(_parts(first), values, strict=True)})


def _parts(state: Any) -> list[tuple[str, Any]]:
    if isinstance(state, tuple):
        return [(str(place), part) for place, part in enumerate(state)]
    assert is_dataclass(state), f"a state is made of arrays, tuples and dataclasses, got {type(state).__name__}"
    return [(field.name, getattr(state, field.name)) for field in fields(state)]


def _aligned(mask: Mask, column: AnyArray) -> Mask:
    return mask.reshape(mask.shape + (1,) * (column.ndim - 1))
