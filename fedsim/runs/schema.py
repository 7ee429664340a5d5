"""The tables of a run: their columns and types, and how records become rows.

In ``ticks``, ``statistic`` is ``nan`` where the client was not watched (its law is being learnt, or an action is in flight),
and ``dense_*`` where the dense model was not evaluated. In ``truth``, ``change_at`` is -1 for a client that never changes.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from fedsim.records import Deployment, Event, Record, Round, Tick

_INT, _FLOAT, _TEXT = pa.int64(), pa.float64(), pa.string()
_TYPES: dict[Any, Any] = {int: _INT, float: _FLOAT, str: _TEXT}

SCHEMAS: dict[str, Any] = {
    "rounds": pa.schema(
        {
            "round": _INT,
            "distance": _FLOAT,
            "train_loss": _FLOAT,
            "test_loss": _FLOAT,
            "test_accuracy": _FLOAT,
            "uploads": _INT,
            "bytes_up": _INT,
            "bytes_down": _INT,
            "cost_ratio": _FLOAT,
            "flops": _FLOAT,
            "wasted_bytes": _INT,
            "wasted_flops": _FLOAT,
            "seconds": _FLOAT,
            "clock": _FLOAT,
            "note": _TEXT,
        }
    ),
    "clients": pa.schema(
        {
            "round": _INT,
            "client": _INT,
            "train_loss": _FLOAT,
            "uploads": _INT,
            "bytes_up": _INT,
            "bytes_down": _INT,
            "flops": _FLOAT,
            "seconds": _FLOAT,
            "block": _TEXT,
        }
    ),
    "deployments": pa.schema(
        {
            "client": _INT,
            "device": _TEXT,
            "group": _INT,
            "level": _FLOAT,
            "sparsity": _FLOAT,
            "parameters": _INT,
            "bytes": _INT,
            "flops": _FLOAT,
        }
    ),
    "truth": pa.schema({"client": _INT, "drift": _INT, "change_at": _INT}),
    "ticks": pa.schema(
        {
            "tick": _INT,
            "client": _INT,
            "loss": _FLOAT,
            "accuracy": _FLOAT,
            "statistic": _FLOAT,
            "dense_loss": _FLOAT,
            "dense_accuracy": _FLOAT,
        }
    ),
    "events": pa.schema({f.name: _TYPES[f.type] for f in dataclasses.fields(Event)}),
}


def arrow_table(name: str, columns: Mapping[str, ArrayLike]) -> Any:
    """``columns`` as a table of schema ``name``; scalars are repeated to the length of the others.

    Raises ``ValueError`` for an unknown table, missing or unknown columns, unequal lengths, or fractions in whole-number columns.
    """
    schema = _schema(name)
    if set(columns) != set(schema.names):
        missing, unknown = sorted(set(schema.names) - set(columns)), sorted(set(columns) - set(schema.names))
        raise ValueError(f"columns of table {name!r} are {schema.names}; missing {missing}, unknown {unknown}")
    arrays = [np.asarray(columns[field.name]) for field in schema]
    lengths = {len(a) for a in arrays if a.ndim} or {1}
    if len(lengths) > 1:
        raise ValueError(f"columns of table {name!r} differ in length: { {f.name: a.shape for f, a in zip(schema, arrays, strict=True)} }")
    (length,) = lengths
    return pa.table([_column(name, f, np.broadcast_to(a, length)) for f, a in zip(schema, arrays, strict=True)], schema=schema)


def empty_table(name: str) -> Any:
    """Table ``name`` without rows."""
    return _schema(name).empty_table()


def column(table: Any, name: str) -> NDArray[Any]:
    """One column as a NumPy array (strings as fixed-width unicode)."""
    values = table[name].to_numpy()
    as_numpy: NDArray[Any] = values.astype(np.str_) if values.dtype == object else values
    return as_numpy


def tabulate(records: Iterable[Record]) -> dict[str, dict[str, NDArray[Any]]]:
    """Columns of every table that ``records`` add rows to: what one part file of each table holds."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    events: list[Event] = []
    for record in records:
        if isinstance(record, Event):
            events.append(record)
        else:
            for table, columns in _rows(record):
                rows.setdefault(table, []).append(columns)
    if events:
        rows["events"] = [{name: np.array([getattr(e, name) for e in events]) for name in SCHEMAS["events"].names}]
    return {table: _concatenated(table, parts) for table, parts in rows.items()}


def _rows(record: Round | Deployment | Tick) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(record, Round):
        scalars = {name: getattr(record, name) for name in SCHEMAS["rounds"].names}
        return [("rounds", scalars), ("clients", {"round": record.round, **record.clients})]
    if isinstance(record, Tick):
        return [("ticks", {"tick": record.tick, **record.clients})]
    return [("deployments", record.clients)]


def _concatenated(table: str, parts: list[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    whole = pa.concat_tables([arrow_table(table, part) for part in parts])
    return {name: column(whole, name) for name in whole.column_names}


def _column(table: str, field: Any, values: NDArray[Any]) -> Any:
    kinds = {_INT: "iub", _FLOAT: "fiu", _TEXT: "UO"}[field.type]
    if values.dtype.kind not in kinds and values.size:
        raise ValueError(f"column {field.name!r} of table {table!r} holds {field.type}, got {values.dtype}")
    if field.type == _TEXT:
        return pa.array(values if values.dtype.kind == "U" else values.tolist(), _TEXT)
    return pa.array(np.ascontiguousarray(values, np.int64 if field.type == _INT else np.float64))


def _schema(name: str) -> Any:
    if name not in SCHEMAS:
        raise ValueError(f"unknown table {name!r}; a run has {sorted(SCHEMAS)}")
    return SCHEMAS[name]
