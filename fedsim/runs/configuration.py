"""A stored configuration as the Python expression a reader would write: constructor calls, one line where they fit."""

from collections.abc import Iterable
from typing import Any

_WIDTH = 96
_INDENT = "    "


def expression(tree: Any, *, margin: int = 0) -> str:
    """The encoding tree of a value (see ``fedsim.encoding``) as readable text; arrays are named, not printed.

    >>> expression({"type": "fedsim.policies:Periodic", "fields": {"every": 40, "stagger": True}})
    'Periodic(every=40, stagger=True)'
    """
    if isinstance(tree, list):
        return _bracketed("[", [("", v) for v in tree], "]", margin)
    if not isinstance(tree, dict):
        return repr(tree)
    (kind, body), *rest = tree.items()
    if kind == "type":
        return _bracketed(f"{_short(body)}(", [(f"{k}=", v) for k, v in rest[0][1].items()], ")", margin)
    if kind == "map":
        return _bracketed("{", [(f"{k!r}: ", v) for k, v in body], "}", margin)
    if kind == "tuple":
        return _bracketed("(", [("", v) for v in body], ",)" if len(body) == 1 else ")", margin)
    if kind == "name":
        return _short(body)
    return f"array({body})" if kind == "array" else str(body)


def _bracketed(start: str, items: Iterable[tuple[str, Any]], end: str, margin: int) -> str:
    items = list(items)
    line = start + ", ".join(label + expression(value, margin=0) for label, value in items) + end
    if len(line) + margin <= _WIDTH and "\n" not in line:
        return line
    inner = margin + len(_INDENT)
    parts = (" " * inner + label + expression(value, margin=inner) + "," for label, value in items)
    return "\n".join([start, *parts, " " * margin + end.lstrip(",")])


def _short(name: str) -> str:
    return name.rpartition(":")[2]
