"""Values as JSON plus arrays: the one form of configs, checkpoints and content digests. Nothing is ever unpickled.

A value is built of ``None``, booleans, numbers, strings, tuples, lists, string-keyed dictionaries, NumPy arrays, paths,
classes and functions (by import path), and dataclasses (by import path and fields).
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import CheckpointError

Arrays = dict[str, NDArray[Any]]
_TRUSTED = ("fedsim", "detection")


def digest(*values: Any) -> str:
    """Content digest (32 hexadecimal characters) of ``values``; the same types and contents give the same digest on every machine."""
    tree, arrays = encode(values)
    return _digest(tree, arrays)


def encode(value: Any) -> tuple[Any, Arrays]:
    """``value`` as a JSON tree and the arrays it refers to. Raises ``TypeError`` with the path of what has no encoding."""
    arrays: Arrays = {}
    return _encode(value, arrays, "value"), arrays


def decode(tree: Any, arrays: Mapping[str, NDArray[Any]], *, trusted: tuple[str, ...] = _TRUSTED) -> Any:
    """Inverse of :func:`encode`. Only dataclasses, classes and functions of the ``trusted`` packages are imported.

    Raises ``CheckpointError`` for anything else, so a file cannot name code of its own choosing.
    """
    if isinstance(tree, list):
        return [decode(v, arrays, trusted=trusted) for v in tree]
    if not isinstance(tree, dict):
        return tree
    (kind, body), *rest = tree.items()
    if kind == "float":
        return float(body)
    if kind == "path":
        return Path(body)
    if kind == "array":
        return arrays[body]
    if kind == "tuple":
        return tuple(decode(v, arrays, trusted=trusted) for v in body)
    if kind == "map":
        return {k: decode(v, arrays, trusted=trusted) for k, v in body}
    if kind == "name":
        return _import(body, trusted)
    if kind == "type":
        cls = _import(body, trusted)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise CheckpointError(f"{body} is not a dataclass, so it cannot be part of a stored value")
        return cls(**{k: decode(v, arrays, trusted=trusted) for k, v in rest[0][1].items()})
    raise CheckpointError(f"unknown entry {kind!r} in a stored value")


def save(path: str | Path, value: Any) -> None:
    """Write ``value`` to one file: complete or absent, never half (temporary file, flush to disk, rename)."""
    tree, arrays = encode(value)
    header = json.dumps({"tree": tree, "digest": _digest(tree, arrays)}).encode()
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, __header__=np.frombuffer(header, np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; earlier checkpoints are untouched") from error


def load(path: str | Path, *, trusted: tuple[str, ...] = _TRUSTED) -> Any:
    """Read what :func:`save` wrote. ``CheckpointError`` for a missing, damaged or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files if k != "__header__"}
            header = json.loads(file["__header__"].tobytes())
        intact = header["digest"] == _digest(header["tree"], arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged or not written by fedsim: {error}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return decode(header["tree"], arrays, trusted=trusted)


def packages_of(value: Any) -> tuple[str, ...]:
    """Top-level packages of the classes and functions in ``value``, beside fedsim's own: what :func:`decode` must trust to rebuild it."""
    found = {name.partition(":")[0].partition(".")[0] for name in _names(encode(value)[0])}
    return tuple(sorted(found - set(_TRUSTED)))


def classes_of(value: Any) -> list[Any]:
    """The user's own classes and functions in ``value``: those of packages beside fedsim's own, by name."""
    names = sorted({name for name in _names(encode(value)[0]) if name.partition(":")[0].partition(".")[0] not in _TRUSTED})
    return [_import(name, packages_of(value)) for name in names]


def _names(tree: Any) -> Iterator[str]:
    if isinstance(tree, list):
        for entry in tree:
            yield from _names(entry)
    elif isinstance(tree, dict):
        (kind, body), *rest = tree.items()
        if kind in ("name", "type"):
            yield body
        for entry in [body, *(value for _, value in rest)]:
            yield from _names(list(entry.values()) if kind == "type" and isinstance(entry, dict) else entry)


def _encode(value: Any, arrays: Arrays, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError(f"{where}: arrays of Python objects have no stored form")
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, arrays, f"{where}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(v, arrays, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise TypeError(f"{where}: only dictionaries with string keys have a stored form")
        return {"map": [[k, _encode(v, arrays, f"{where}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, type | FunctionType):
        return {"name": _name(value)}
    if dataclasses.is_dataclass(value):
        fields = {f.name: _encode(getattr(value, f.name), arrays, f"{where}.{f.name}") for f in dataclasses.fields(value) if f.init}
        return {"type": _name(type(value)), "fields": fields}
    raise TypeError(
        f"{where}: a {type(value).__module__}.{type(value).__qualname__} has no stored form; use a dataclass of plain values and arrays"
    )


def _digest(tree: Any, arrays: Arrays) -> str:
    code = hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16)
    for name, array in arrays.items():
        code.update(f"{name} {array.dtype.str} {array.shape}".encode())
        if array.size:
            code.update(np.ascontiguousarray(array).tobytes())
    return code.hexdigest()


def _name(value: Any) -> str:
    if "<" in value.__qualname__:
        raise TypeError(f"{value.__qualname__} has no import path (a lambda or a local definition); define it at the top of a module")
    return f"{value.__module__}:{value.__qualname__}"


def _import(name: str, trusted: tuple[str, ...]) -> Any:
    module, _, qualname = name.partition(":")
    if module.partition(".")[0] not in trusted:
        raise CheckpointError(f"{name} is not from a trusted package {trusted}; re-run the script that defines it, or pass its recipe")
    try:
        value: Any = sys.modules.get(module) or importlib.import_module(module)
        for part in qualname.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"{name} cannot be imported: {error}") from error
    return value
