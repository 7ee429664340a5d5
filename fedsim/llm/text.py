"""Where text comes from: files, tables and the standard library, as documents with authors.

A source is a small value with ``read() -> Documents``; it names its files, so that a run's configuration does too.

Exports: Columns, Documents, JSONLines, Parquet, Play, PythonSource, Source, TextFile, WikiText, json_lines, read_text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Documents:
    """Texts, and the author of each (none: nobody). A source too: what it reads is itself."""

    texts: tuple[str, ...]
    authors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(self.texts))
        object.__setattr__(self, "authors", tuple(self.authors))
        if not any(self.texts):
            raise ValueError("there is no text in the documents")
        if self.authors and len(self.authors) != len(self.texts):
            raise ValueError(f"there must be an author for each of {len(self.texts)} texts, or none; got {len(self.authors)}")

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Documents({len(self)} texts of {sum(map(len, self.texts))} characters)"

    def read(self) -> "Documents":
        return self


class Source(Protocol):
    """Anything that documents can be read from."""

    def read(self) -> Documents: ...


@dataclass(frozen=True)
class TextFile:
    """A plain text file: a document for each ``size`` characters (cut after a line), or for each paragraph with ``size=None``."""

    path: str
    size: int | None = 2000

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 character, got {self.size!r}")

    def read(self) -> Documents:
        text = read_text(self.path)
        if self.size is None:
            return _documents((p for p in re.split(r"\n\s*\n", text) if p.strip()), self.path)
        return _documents(_pieces(text, self.size), self.path)


@dataclass(frozen=True)
class WikiText:
    """A file of the WikiText corpora: a document for each article, whose heading is `` = Title = ``."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))

    def read(self) -> Documents:
        articles = re.split(r"(?m)^(?= = [^=\n](?:[^\n]*[^=\n])? = $)", read_text(self.path))
        return _documents((a.strip() for a in articles if a.strip()), self.path)


@dataclass(frozen=True)
class Play:
    """A play: a document for each speech, whose author is the speaker named on the line before it (``ROMEO:``). ``speakers`` keeps only theirs."""

    path: str
    speakers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "speakers", tuple(self.speakers))

    def read(self) -> Documents:
        parts = re.split(r"(?m)^([A-Z][A-Za-z' ]*):\n", read_text(self.path))
        speeches = [(name, speech.strip()) for name, speech in zip(parts[1::2], parts[2::2], strict=True) if speech.strip()]
        if self.speakers:
            known = {name for name, _ in speeches}
            if missing := sorted(set(self.speakers) - known):
                raise ValueError(f"speakers {missing} say nothing in {self.path}; its speakers are {sorted(known)[:20]} ...")
            speeches = [s for s in speeches if s[0] in self.speakers]
        return _documents((speech for _, speech in speeches), self.path, tuple(name for name, _ in speeches))


@dataclass(frozen=True)
class JSONLines:
    """A file with a JSON object a line, its text under ``text`` and its author, if any, under ``author``."""

    path: str
    text: str = "text"
    author: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))

    def read(self) -> Documents:
        rows = json_lines(self.path)
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
        return _of_columns(columns, list(columns), self.text, self.author, self.path)


@dataclass(frozen=True)
class Parquet:
    """A Parquet file with the column ``text`` and, if named, ``author``."""

    path: str
    text: str = "text"
    author: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))

    def read(self) -> Documents:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(self.path).is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        try:
            names = pq.read_schema(self.path).names
            wanted = _wanted(names, self.text, self.author)
            table = pq.read_table(self.path, columns=wanted)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a readable Parquet file: {error}") from error
        return _of_columns({n: table.column(n).to_pylist() for n in wanted}, names, self.text, self.author, self.path)


@dataclass(frozen=True, eq=False)
class Columns:
    """Anything with named columns, such as a Hugging Face ``Dataset``."""

    table: Any
    text: str = "text"
    author: str | None = None

    def read(self) -> Documents:
        names = getattr(self.table, "column_names", None) or list(self.table)
        return _of_columns({n: self.table[n] for n in _wanted(names, self.text, self.author)}, names, self.text, self.author, "the table")


@dataclass(frozen=True)
class PythonSource:
    """Code: the Python modules of the standard library whose names are given, a document for each ``size`` characters."""

    modules: tuple[str, ...] = (
        "argparse",
        "ast",
        "csv",
        "dataclasses",
        "difflib",
        "fractions",
        "heapq",
        "json.decoder",
        "shutil",
        "tarfile",
    )
    size: int = 2000

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))

    def read(self) -> Documents:
        from importlib.util import find_spec

        texts: list[str] = []
        for name in self.modules:
            spec = find_spec(name)
            if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
                raise ValueError(f"modules names {name!r}, which has no Python source here")
            texts += _pieces(read_text(spec.origin), self.size)
        return Documents(tuple(texts))


def json_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a file with one a line. Raises ``ValueError`` with the number of a line that holds none."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: strings in JSON may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} must be a JSON object, got {line.strip()[:40]!r}")
        rows.append(row)
    return rows


def read_text(path: str) -> str:
    """All of a file. Raises ``FileNotFoundError``, and ``ValueError`` for one that is not UTF-8."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def _wanted(names: Sequence[str], *columns: str | None) -> list[str]:
    return [name for name in columns if name is not None and name in names]


def _of_columns(columns: Mapping[str, Any], names: Sequence[str], text: str, author: str | None, where: str) -> Documents:
    for name in (text, author):
        if name is not None and name not in names:
            raise ValueError(f"{where} has no column {name!r}; its columns are {', '.join(names)}")
    texts = list(columns[text])
    for number, found in enumerate(texts):
        if not isinstance(found, str):
            raise ValueError(f"row {number} of column {text!r} of {where} must be text, got {found!r}")
    if author is None:
        return _documents(texts, where)
    authors = list(columns[author])
    for number, found in enumerate(authors):
        if found is None or found != found:  # NaN too
            raise ValueError(f"row {number} of column {author!r} of {where} names no author; name one in every row, or set author=None")
    return _documents(texts, where, tuple(map(str, authors)))


def _documents(texts: Any, where: str, authors: tuple[str, ...] = ()) -> Documents:
    found = tuple(texts)
    if not any(found):
        raise ValueError(f"there is no text in {where}")
    return Documents(found, authors)


def _pieces(text: str, size: int) -> Iterator[str]:
    """Runs of whole lines, each ended by the first line that brings it to ``size`` characters."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= size:
            yield "".join(piece)
            piece, length = [], 0
    if length:
        yield "".join(piece)
