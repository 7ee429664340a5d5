"""What a detector is, field by field, in a few characters each: to tell whether a stored state belongs to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from hashlib import blake2b
from numbers import Real
from types import FunctionType
from typing import Any

import numpy as np

from detection.detector import Detector


def fingerprint(detector: Detector[Any]) -> dict[str, str]:
    """A line for the class and for each field of ``detector``, by name; detectors inside it contribute theirs under dotted names.

    Numbers and names stand for themselves, everything else for its class and a digest of all it holds, arrays included. Detectors that are
    equal have equal fingerprints. Raises ``ValueError`` for a field that holds an object whose content cannot be read.

    >>> from detection import FOCuS
    >>> fingerprint(FOCuS(threshold=9))
    {'class': 'FOCuS', 'threshold': '9.0', 'mean': '0.0', 'side': "'up'"}
    """
    return dict(_lines(detector, ""))


def differences(stored: Mapping[str, str], given: Mapping[str, str]) -> str:
    """What differs between two fingerprints, in words; empty where nothing does. Of detectors of two classes, the classes alone."""
    names = [name for name in {**stored, **given} if stored.get(name) != given.get(name)]
    if "class" in names:
        names = ["class"]
    return ", ".join(f"{name} (stored {stored.get(name, 'nothing')}, given {given.get(name, 'nothing')})" for name in names)


def _lines(detector: Detector[Any], prefix: str) -> Iterator[tuple[str, str]]:
    yield f"{prefix}class", type(detector).__qualname__
    for name, value in _content(detector):
        yield from _field(f"{prefix}{name}", value)


def _field(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Detector):
        yield from _lines(value, f"{name}.")
    elif isinstance(value, tuple) and value and all(isinstance(part, Detector) for part in value):
        yield f"{name}.length", str(len(value))
        for place, part in enumerate(value):
            yield from _lines(part, f"{name}.{place}.")
    else:
        yield name, _line(name, value)


def _line(name: str, value: Any) -> str:
    try:
        pieces = list(_pieces(value))
    except TypeError as error:
        raise ValueError(f"a detector can be stored where its fields are made of numbers, but {name} holds {error}") from error
    if len(pieces) == 1 and len(pieces[0]) <= 32:
        return pieces[0].decode()
    digest = blake2b(digest_size=8)
    for piece in pieces:
        digest.update(b"%d:" % len(piece))
        digest.update(piece)
    return f"{type(value).__qualname__} {digest.hexdigest()}"


def _pieces(value: Any) -> Iterator[bytes]:
    """All that ``value`` holds, in an order that depends on its content alone. Raises ``TypeError`` for what cannot be read."""
    if value is None or isinstance(value, str | bytes):
        yield repr(str(value) if isinstance(value, str) else value).encode()
    elif isinstance(value, Real | np.bool_):  # numbers that are equal are one, whatever their type
        yield repr(float(value) + 0.0 if float(value) == value or value != value else value).encode()
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype.str} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, type | FunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        yield from _pieces([cell.cell_contents for cell in getattr(value, "__closure__", None) or ()])
    elif isinstance(value, Mapping):
        yield f"{len(value)} keys".encode()
        yield from sorted(b"".join(_pieces(pair)) for pair in value.items())
    elif isinstance(value, Sequence):
        yield f"{len(value)} parts".encode()
        for part in value:
            yield from _pieces(part)
    else:
        yield type(value).__qualname__.encode()
        for name, part in _content(value):
            yield name.encode()
            yield from _pieces(part)


def _content(value: Any) -> Iterator[tuple[str, Any]]:
    """Fields that count for equality, or the attributes of an object that is no dataclass, without what it computed for itself."""
    if is_dataclass(value):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value) if field.compare)
    elif hasattr(value, "__dict__"):
        own = vars(value)
        yield from ((name, own[name]) for name in sorted(own) if not isinstance(getattr(type(value), name, None), cached_property))
    else:
        raise TypeError(f"an object of {type(value).__qualname__}")
