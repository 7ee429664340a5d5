"""Who the clients are, as columns: compute, memory, links, availability, device class, group and place. A million rows are cheap.

Exports :class:`Fleet`, :class:`DeviceClass` and the ready mixes :data:`MIXES`.
"""

# C clients, D device classes

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.partition import IID, Partition, Shards
from fedsim.randomness import rng_for
from fedsim.tasks.base import Dataset

Floats = NDArray[np.float64]

_POSITIVE = ("flops", "memory", "up", "down")
_PLACE = ("region_u", "region_v")
_CLUSTER_SD = 0.1  # spread of a group's clients around its centre, in the unit square


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """A kind of device and its ``share`` of the fleet (shares are relative to their sum).

    ``flops`` (sustained FLOP/s), ``memory`` (bytes a model may use), ``up`` and ``down`` (bytes/s) are medians of log-normal laws
    with log standard deviation ``spread`` for compute and memory and ``link_spread`` for both directions of the link together.
    ``availability`` is the share of time a device takes part.
    """

    name: str
    share: float
    flops: float
    memory: float
    up: float
    down: float
    availability: float = 1.0
    spread: float = 0.25
    link_spread: float = 0.5

    def __post_init__(self) -> None:
        for name in ("share", *_POSITIVE):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} of device class {self.name!r} must be positive and finite, got {getattr(self, name)!r}")
        for name in ("spread", "link_spread"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} of device class {self.name!r} must be finite and at least 0, got {getattr(self, name)!r}")
        if not 0.0 < self.availability <= 1.0:
            raise ValueError(f"availability of device class {self.name!r} must lie in (0, 1], got {self.availability!r}")


# Orders of magnitude: sustained single-precision rates of phone processors and of Cortex-A/M boards, RAM that an app or a
# firmware can spend on one model, and median 5G, 4G, 3G and low-power links.
MIXES: Mapping[str, tuple[DeviceClass, ...]] = {
    "mixed-phones": (
        DeviceClass(name="flagship", share=0.15, flops=4e10, memory=2e9, up=2.5e6, down=1.2e7, availability=0.9),
        DeviceClass(name="mid-range", share=0.40, flops=1.5e10, memory=1e9, up=1.2e6, down=5e6, availability=0.8),
        DeviceClass(name="budget", share=0.30, flops=5e9, memory=4e8, up=6e5, down=2.5e6, availability=0.7),
        DeviceClass(name="old", share=0.15, flops=1.5e9, memory=1.5e8, up=1.5e5, down=6e5, availability=0.6),
    ),
    "edge-mix": (
        DeviceClass(name="gateway", share=0.10, flops=1e11, memory=4e9, up=1.2e7, down=1.2e7, link_spread=0.2),
        DeviceClass(name="single-board", share=0.30, flops=8e9, memory=5e8, up=2.5e6, down=5e6, availability=0.95),
        DeviceClass(name="microcontroller", share=0.40, flops=2e8, memory=5e5, up=5e4, down=1e5, availability=0.9),
        DeviceClass(name="sensor", share=0.20, flops=3e7, memory=2e5, up=1e4, down=2e4, availability=0.7),
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Fleet:
    """Columns over C clients, and the partition by which they share a data set.

    ``flops`` FLOP/s, ``memory`` bytes, ``up`` and ``down`` bytes/s, ``availability`` in (0, 1], ``device`` (index into ``device_names``),
    ``group`` (a whole number: neighbourhood, customer, ...) and ``region`` (C, 2) in the unit square, ``nan`` where a place is unknown.
    Raises ``ValueError`` naming the column, the row and the value of the first bad entry.

    >>> fleet = Fleet.sample(1000, devices="mixed-phones", seed=0)
    >>> len(fleet), fleet.device_names
    (1000, ('flagship', 'mid-range', 'budget', 'old'))
    """

    flops: Floats
    memory: Floats
    up: Floats
    down: Floats
    availability: Floats
    device: NDArray[np.int8]
    group: NDArray[np.int32]
    region: Floats
    device_names: tuple[str, ...]
    partition: Partition = field(default_factory=IID)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in _COLUMNS.items():
            object.__setattr__(self, name, _as_column(name, getattr(self, name), kind))
        object.__setattr__(self, "device_names", tuple(self.device_names))
        self._check_lengths()
        for name in _POSITIVE:
            column = getattr(self, name)
            _check(name, column, (column > 0) & np.isfinite(column), "be positive and finite")
        _check("availability", self.availability, (self.availability > 0) & (self.availability <= 1), "lie in (0, 1]")
        _check(
            "device", self.device, (self.device >= 0) & (self.device < len(self.device_names)), f"index device_names={self.device_names}"
        )
        placed = np.isnan(self.region).all(axis=1) | ((self.region >= 0) & (self.region <= 1)).all(axis=1)
        _check("region", self.region, placed, "lie in the unit square, or be nan where unknown")

    @classmethod
    def sample(
        cls,
        num: int,
        devices: str | Sequence[DeviceClass] = "mixed-phones",
        partition: Partition | None = None,
        seed: int = 0,
        groups: int = 4,
    ) -> "Fleet":
        """``num`` clients drawn from device classes (a name of :data:`MIXES`, or your own), each in one of ``groups`` places.

        A group's clients lie around its centre in the unit square with standard deviation 0.1. A client's row does not
        depend on ``num``. ``partition`` is :class:`IID` unless given.
        """
        if num < 1:
            raise ValueError(f"the number of clients must be at least 1, got {num}")
        if not 1 <= groups < 2**31:
            raise ValueError(f"groups must be at least 1, got {groups}")
        classes = _classes(devices)
        shares = np.array([d.share for d in classes])
        device = _choices(rng_for(seed, "fleet", "device").random(num), shares).astype(np.int8)
        group = _choices(rng_for(seed, "fleet", "group").random(num), np.ones(groups)).astype(np.int32)
        spread, link_spread = (np.array([getattr(d, name) for d in classes])[device] for name in ("spread", "link_spread"))
        factors = {name: _lognormal(seed, name, spread) for name in ("flops", "memory")}
        factors["up"] = factors["down"] = _lognormal(seed, "link", link_spread)  # one radio: a poor link is poor both ways
        columns = {name: np.array([getattr(d, name) for d in classes])[device] * factors[name] for name in _POSITIVE}
        return cls(
            **columns,
            availability=np.array([d.availability for d in classes])[device],
            device=device,
            group=group,
            region=_places(group, groups, seed),
            device_names=tuple(d.name for d in classes),
            partition=IID() if partition is None else partition,
            seed=seed,
        )

    @classmethod
    def from_table(cls, table: Any, partition: Partition | None = None, seed: int = 0) -> "Fleet":
        """A fleet from a Parquet or CSV file, a DataFrame, an Arrow table or a mapping of columns.

        Needs ``flops, memory, up, down``. Optional: ``availability`` (else 1), ``device`` (names, kept in alphabetical order; else "device"), ``group``
        (whole numbers; else 0), ``region_u`` and ``region_v`` (else unknown). Other columns are left aside. Raises ``ValueError``
        naming the columns that are missing and ``FileNotFoundError`` for a missing file.
        """
        columns = read_columns(table)
        missing = [name for name in _POSITIVE if name not in columns]
        if missing:
            raise ValueError(f"the fleet table lacks column(s) {', '.join(missing)}; it has {', '.join(columns) or 'none'}")
        given = {name: _as_column(name, columns[name], np.float64) for name in _POSITIVE}
        num = len(given["flops"])
        names, device = _device_classes(columns.get("device", np.full(num, "device")))
        if (_PLACE[0] in columns) != (_PLACE[1] in columns):
            raise ValueError(f"columns {' and '.join(_PLACE)} must be given together")
        place = [_as_column(name, columns.get(name, np.full(num, np.nan)), np.float64) for name in _PLACE]
        _check_equal({name: len(column) for name, column in {**given, _PLACE[0]: place[0], _PLACE[1]: place[1]}.items()})
        return cls(
            **given,
            availability=_as_column("availability", columns.get("availability", np.ones(num)), np.float64),
            device=device,
            group=_as_column("group", columns.get("group", np.zeros(num)), np.int32),
            region=np.stack(place, axis=1),
            device_names=names,
            partition=IID() if partition is None else partition,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.flops)

    def __repr__(self) -> str:
        counts = np.bincount(self.device, minlength=len(self.device_names))
        mix = ", ".join(f"{count} {name}" for name, count in zip(self.device_names, counts, strict=True))
        return f"Fleet({len(self)} clients: {mix}; {self.partition!r}, seed={self.seed})"

    def shards(self, dataset: Dataset) -> Shards:
        """The examples of ``dataset`` that each client holds. Warns of clients that hold none: they never train."""
        shards = self.partition.split(dataset, len(self), self.seed)
        empty = int((shards.sizes == 0).sum())
        if empty:
            warnings.warn(f"{empty} of {len(self)} clients hold no examples and never train", stacklevel=1)
        return shards

    def to_table(self) -> dict[str, NDArray[Any]]:
        """The columns as :meth:`from_table` reads them."""
        return {
            **{name: getattr(self, name) for name in (*_POSITIVE, "availability")},
            "device": np.asarray(self.device_names)[self.device],
            "group": self.group,
            **{name: self.region[:, i] for i, name in enumerate(_PLACE)},
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_table` to a ``.parquet`` or ``.csv`` file."""
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        table = pa.table({name: pa.array(column) for name, column in self.to_table().items()})
        write = {".parquet": pyarrow.parquet.write_table, ".csv": pyarrow.csv.write_csv}
        write[_suffix(Path(path))](table, str(path))

    def _check_lengths(self) -> None:
        if self.region.ndim != 2 or self.region.shape[1] != 2:
            raise ValueError(f"region must have shape (C, 2), got {self.region.shape}")
        _check_equal({name: len(getattr(self, name)) for name in _COLUMNS})
        if not len(self):
            raise ValueError("a fleet needs at least one client")


_COLUMNS: Mapping[str, type] = {
    **dict.fromkeys((*_POSITIVE, "availability", "region"), np.float64),
    "device": np.int8,
    "group": np.int32,
}


def _check_equal(lengths: Mapping[str, int]) -> None:
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must have one length, got {', '.join(f'{name} {length}' for name, length in lengths.items())}")


def _check(name: str, column: NDArray[Any], good: Any, rule: str) -> None:
    bad = np.flatnonzero(np.logical_not(good))
    if len(bad):
        raise ValueError(f"column {name}, row {bad[0]}: must {rule}, got {column[bad[0]]} ({len(bad)} bad of {len(column)})")


def _as_column(name: str, values: Any, kind: type) -> NDArray[Any]:
    """``values`` as an array of ``kind``; whole numbers must be whole and in range."""
    try:
        column = np.asarray(values)
        numbers = column if column.dtype.kind in "iuf" else column.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name} must hold numbers: {error}") from error
    if numbers.ndim != (2 if name == "region" else 1):
        raise ValueError(f"column {name} must have {2 if name == 'region' else 1} dimension(s), got shape {numbers.shape}")
    if kind is not np.float64:
        info = np.iinfo(kind)
        whole = (numbers == np.floor(numbers)) & (numbers >= info.min) & (numbers <= info.max)
        _check(name, numbers, whole, f"be a whole number in {info.min}..{info.max}")
    return numbers.astype(kind, copy=False)


def _device_classes(column: Any) -> tuple[tuple[str, ...], NDArray[np.int8]]:
    """Distinct names, and each client's index among them."""
    values = np.asarray(column)
    if values.dtype.kind == "O":
        _check("device", values, [isinstance(v, str) for v in values], "be a name")
    names, device = np.unique(values.astype(str), return_inverse=True)
    if len(names) > 127:
        raise ValueError(f"column device names {len(names)} device classes; at most 127 are allowed (is it a device id?)")
    return tuple(str(name) for name in names), device.astype(np.int8)


def _classes(devices: str | Sequence[DeviceClass]) -> tuple[DeviceClass, ...]:
    if isinstance(devices, str):
        if devices not in MIXES:
            raise ValueError(f"devices: {devices!r} is unknown; choose from {', '.join(MIXES)}, or give DeviceClass values")
        return MIXES[devices]
    names = [d.name for d in devices]
    if not 1 <= len(names) <= 127 or len(set(names)) < len(names):
        raise ValueError(f"devices must be 1 to 127 device classes with different names, got {names}")
    return tuple(devices)


def _choices(uniforms: Floats, weights: Floats) -> NDArray[np.intp]:
    edges = np.cumsum(weights / weights.sum())[:-1]
    return np.searchsorted(edges, uniforms, side="right")


def _lognormal(seed: int, name: str, spread: Floats) -> Floats:
    """Factors (C,) of median 1."""
    return np.asarray(np.exp(spread * rng_for(seed, "fleet", name).standard_normal(len(spread))))


def _places(group: NDArray[np.int32], groups: int, seed: int) -> Floats:
    """Points (C, 2) around each group's centre, reflected at the border of the unit square."""
    rng = rng_for(seed, "fleet", "region")
    centres = rng.random((groups, 2))
    points = centres[group] + _CLUSTER_SD * rng.standard_normal((len(group), 2))
    points %= 2.0
    return np.where(points > 1.0, 2.0 - points, points)


def read_columns(table: Any) -> dict[str, Any]:
    """Columns by name, of any of the forms that :meth:`Fleet.from_table` takes."""
    if isinstance(table, str | Path):
        table = _read(Path(table))
    names = table if isinstance(table, Mapping) else getattr(table, "column_names", None) or getattr(table, "columns", None)
    if names is None:
        raise ValueError(f"a fleet table is a .parquet or .csv path, a DataFrame or a mapping of columns, got a {type(table).__name__}")
    return {str(name): table[name] for name in names}


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return pyarrow.parquet.read_table(path) if suffix == ".parquet" else pyarrow.csv.read_csv(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable {suffix} file: {error}") from error


def _suffix(path: Path) -> str:
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"a fleet file must end in .parquet or .csv, got {path.name!r}")
    return path.suffix
