"""Pictures from Parquet files, arrays or Hugging Face ``datasets`` objects, with a small CNN or a ResNet-9."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.randomness import rng_for, torch_seeded
from fedsim.tasks.base import Dataset, Splits, Task, check_finite, check_share, hold_out
from fedsim.tasks.models import ResNet9, cifar_cnn

# N pictures, H height, W width, C channels

_WIDTHS = {"cnn": 16, "resnet9": 64}
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures (N, H, W), (N, C, H, W) or (N, H, W, C), whole numbers in 0..255 or floats in [0, 1], and integer labels (N,).

    Where both layouts fit, channels come first. Raises ``ValueError`` for other shapes and values, naming the first bad index.
    """

    inputs: NDArray[Any]
    labels: NDArray[Any]

    def __post_init__(self) -> None:
        inputs, labels = np.asarray(self.inputs), np.asarray(self.labels)
        if inputs.ndim not in (3, 4) or (inputs.ndim == 4 and not {inputs.shape[1], inputs.shape[3]} & set(_CHANNELS)):
            raise ValueError(f"pictures must be (N, H, W), (N, C, H, W) or (N, H, W, C) with C in {_CHANNELS}, got shape {inputs.shape}")
        if inputs.dtype.kind not in "iuf":
            raise ValueError(f"pictures must be whole numbers in 0..255 or floats in [0, 1], got {inputs.dtype}")
        if labels.shape != (len(inputs),) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels must be one integer for each of {len(inputs)} pictures, got shape {labels.shape} of {labels.dtype}")
        if not len(inputs):
            raise ValueError("there are no pictures")
        if inputs.dtype.kind == "f":
            check_finite(inputs, "pictures")
        if inputs.dtype != np.uint8:
            _check_range(inputs)
        object.__setattr__(self, "inputs", inputs if inputs.dtype.kind == "f" else inputs.astype(np.uint8, copy=False))
        object.__setattr__(self, "labels", labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return f"Pictures({len(self)} of {self.inputs.shape[1:]} {self.inputs.dtype})"

    def take(self, chosen: NDArray[np.int64]) -> "Pictures":
        """The pictures at ``chosen`` (M,)."""
        return Pictures(self.inputs[chosen], self.labels[chosen])

    def dataset(self) -> Dataset:
        """float32 in [0, 1], channels first."""
        inputs = self.inputs[:, None] if self.inputs.ndim == 3 else self.inputs
        if inputs.shape[1] not in _CHANNELS:
            inputs = np.moveaxis(inputs, 3, 1)
        scaled = np.ascontiguousarray(inputs, np.float32)
        if inputs.dtype == np.uint8:
            scaled /= np.float32(255)
        return Dataset(scaled, self.labels)


Source = Any  # path(s) of Parquet files, Pictures, (pictures, labels), or an object with columns such as a Hugging Face Dataset


@dataclass(frozen=True, kw_only=True)
class Images(Task):
    """Pictures as float32 in [0, 1], channels first, classified by a small CNN or a ResNet-9 (``width`` channels in the first layer).

    ``train`` and ``test`` are Parquet files (a path or several; pictures as ``{bytes, path}`` or bytes in ``input_column``),
    ``(pictures, labels)`` arrays, :class:`Pictures`, or a Hugging Face ``Dataset``. Without ``test``, ``test_share`` of every label
    is held out. The limits keep a random subset, a function of ``seed``. ``num_classes=None`` becomes one more than the largest
    training label. Raises ``ValueError`` for bad columns, pictures and labels, ``FileNotFoundError`` for a missing file.
    """

    train: Source
    test: Source = None
    model: str = "cnn"
    width: int | None = None
    num_classes: int = None  # type: ignore[assignment]   # an int from construction on
    input_column: str = "img"
    label_column: str = "label"
    train_limit: int | None = None
    test_limit: int | None = None
    test_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in _WIDTHS:
            raise ValueError(f"model: {self.model!r} is unknown; choose from {', '.join(_WIDTHS)}")
        check_share("test_share", self.test_share)
        for name, floor in (("width", 1), ("num_classes", 2), ("train_limit", 1), ("test_limit", 1)):
            value = getattr(self, name)
            if value is not None and value < floor:
                raise ValueError(f"{name} must be at least {floor}, got {value!r}")
        columns = self.input_column, self.label_column
        object.__setattr__(self, "train", _resolve(self.train, *columns))
        object.__setattr__(self, "test", None if self.test is None else _resolve(self.test, *columns))
        if self.num_classes is None:
            object.__setattr__(self, "num_classes", max(2, int(self._labels(self.train).max()) + 1))
        for source in (self.train, self.test):
            if isinstance(source, Pictures):
                self._check_labels(source.labels)

    def load(self) -> Splits:
        if self.test is not None:
            train, test = self._read(self.train, "train", self.train_limit), self._read(self.test, "test", self.test_limit)
        else:
            chosen, held = hold_out(self._labels(self.train), self.test_share, rng_for(self.seed, "images", "split"))
            if not len(held):
                raise ValueError(f"test_share={self.test_share} holds out no picture of {len(chosen)}; raise it or give test=")
            train = self._read(self.train, "train", self.train_limit, chosen)
            test = self._read(self.train, "test", self.test_limit, held)
        shapes = train.inputs.shape[1:], test.inputs.shape[1:]
        if shapes[0] != shapes[1]:
            raise ValueError(f"train and test pictures must have one shape, got {shapes[0]} and {shapes[1]}")
        return Splits(train, test)

    @property
    def example(self) -> Tensor:
        """The first picture of ``train`` (1, C, H, W), read without the others."""
        first = np.zeros(1, np.int64)
        if isinstance(self.train, Pictures):
            return self.train.take(first).dataset().batch(first).inputs
        pictures = _column(self.train[:1], self.input_column, rows=1)
        return Pictures(_decoded(pictures, first), first).dataset().batch(first).inputs

    def build(self, seed: int) -> nn.Module:
        channels, height, breadth = self.example.shape[1:]
        width = self.width or _WIDTHS[self.model]
        with torch_seeded(seed, "model"):
            if self.model == "cnn":
                return cifar_cnn((channels, height, breadth), self.num_classes, width)
            return ResNet9(channels, self.num_classes, width)

    def _read(self, source: Source, split: str, limit: int | None, among: NDArray[np.int64] | None = None) -> Dataset:
        labels = self._labels(source)
        self._check_labels(labels)
        chosen = np.arange(len(labels)) if among is None else among
        if limit is not None and limit < len(chosen):
            chosen = np.sort(rng_for(self.seed, "images", "limit", split).choice(chosen, limit, replace=False))
        if isinstance(source, Pictures):
            return source.take(chosen).dataset()
        return Pictures(_decoded(_column(source, self.input_column), chosen), labels[chosen]).dataset()

    def _labels(self, source: Source) -> NDArray[np.int64]:
        if isinstance(source, Pictures):
            return np.asarray(source.labels, np.int64)
        labels = _column(source, self.label_column)
        if labels.null_count or str(labels.type) not in _INTEGERS or not len(labels):
            raise ValueError(
                f"column {self.label_column!r} of {_names(source)} must hold integers without gaps, got {len(labels)} of {labels.type}"
            )
        return np.asarray(labels.to_numpy(), np.int64)

    def _check_labels(self, labels: NDArray[np.int64]) -> None:
        bad = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(bad):
            raise ValueError(
                f"labels must lie in 0..{self.num_classes - 1} (num_classes={self.num_classes}), got {labels[bad[0]]} at index {bad[0]}"
            )


_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")


def _resolve(source: Source, input_column: str, label_column: str) -> tuple[Path, ...] | Pictures:
    """The stored form of a source: paths, or the pictures themselves."""
    if isinstance(source, Pictures):
        return source
    if isinstance(source, str | Path):
        return (Path(source),)
    if isinstance(source, Sequence) and source and all(isinstance(s, str | Path) for s in source):
        return tuple(Path(s) for s in source)
    if isinstance(source, Sequence) and len(source) == 2:
        return Pictures(np.asarray(source[0]), np.asarray(source[1]))
    if hasattr(source, "features"):
        missing = [c for c in (input_column, label_column) if c not in source.features]
        if missing:
            raise ValueError(f"the data set has no column {missing[0]!r}; its columns are {', '.join(source.features)}")
        return Pictures(_stacked(enumerate(source[input_column])), np.asarray(list(source[label_column])))
    raise ValueError(
        f"a source is path(s) of Parquet files, (pictures, labels), Pictures or a Hugging Face Dataset, got a {type(source).__name__}"
    )


def _column(paths: tuple[Path, ...], name: str, rows: int | None = None) -> Any:
    """One column of Parquet files, as one Arrow array; only the first ``rows`` of each if given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chunks: list[Any] = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
        with file:
            if name not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column {name!r}; its columns are {', '.join(file.schema_arrow.names)}")
            if rows is None:
                chunks += file.read(columns=[name]).column(0).chunks
            else:
                chunks += [batch.column(0) for batch in islice(file.iter_batches(rows, columns=[name]), 1)]
    return pa.chunked_array(chunks).combine_chunks()


def _decoded(pictures: Any, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Pictures (N, H, W, C) of an Arrow column of ``{bytes, path}`` structs or of bytes."""
    import pyarrow as pa

    if pa.types.is_struct(pictures.type) and pictures.type.get_field_index("bytes") >= 0:
        pictures = pictures.field("bytes")
    if not (pa.types.is_binary(pictures.type) or pa.types.is_large_binary(pictures.type)):
        raise ValueError(f"pictures in Parquet must be bytes or a struct with a field bytes, got {pictures.type}")
    return _stacked(zip(chosen.tolist(), pictures.take(pa.array(chosen)).to_pylist(), strict=True))


def _stacked(pictures: Iterable[tuple[int, Any]]) -> NDArray[Any]:
    """One array of numbered pictures given as encoded bytes, Pillow images or arrays; grey if the first is grey, else RGB."""
    from PIL import Image, UnidentifiedImageError

    arrays: list[NDArray[Any]] = []
    mode = ""
    for index, picture in pictures:
        if picture is None:
            raise ValueError(f"picture {index} is missing")
        try:
            image = Image.open(BytesIO(picture)) if isinstance(picture, bytes) else picture
            if isinstance(image, Image.Image):
                mode = mode or ("L" if image.mode in ("1", "L") else "RGB")
                image = image if image.mode == mode else image.convert(mode)
            arrays.append(np.asarray(image))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"picture {index} cannot be decoded: {error}") from error
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"pictures must have one shape: the first is {arrays[0].shape}, picture {index} is {arrays[-1].shape}")
    if not arrays:
        raise ValueError("there are no pictures")
    return np.stack(arrays)


def _check_range(inputs: NDArray[Any]) -> None:
    flat, top = inputs.reshape(len(inputs), -1), 1 if inputs.dtype.kind == "f" else 255
    bad = np.flatnonzero((flat.min(axis=1) < 0) | (flat.max(axis=1) > top))
    if len(bad):
        raise ValueError(
            f"pictures of {inputs.dtype} must lie in [0, {top}]; picture {bad[0]} spans {flat[bad[0]].min():.4g} to {flat[bad[0]].max():.4g}"
        )


def _names(paths: tuple[Path, ...]) -> str:
    return ", ".join(str(path) for path in paths)
