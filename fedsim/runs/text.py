"""Numbers and small tables as people read them: aligned, with units, ``–`` for what is undefined."""

import math
from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table: the first column to the left, the others to the right, two spaces between.

    >>> print(aligned(["policy", "harm"], [["never", "3153"], ["alarm", "355"]]))
    policy  harm
    never   3153
    alarm    355
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(_padded(c, w, i) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines)


def number(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, thousands separated.

    >>> number(12345.6), number(0.12345), number(float("nan"))
    ('12,346', '0.123', '–')
    """
    if math.isnan(value):
        return "–"
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else str(value)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def share(value: float) -> str:
    """A share in [0, 1] as a percentage: ``91.4 %``."""
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def size(num_bytes: float) -> str:
    """Bytes with a decimal unit.

    >>> size(950), size(12_345_678)
    ('950 B', '12.3 MB')
    """
    if math.isnan(num_bytes):
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{number(num_bytes)} {unit}"
        num_bytes /= 1000
    return f"{number(num_bytes)} TB"


def duration(seconds: float) -> str:
    """Simulated seconds in the unit that reads best.

    >>> duration(42), duration(5400)
    ('42 s', '1.5 h')
    """
    if math.isnan(seconds):
        return "–"
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length or (seconds >= length and unit == "h"):
            return f"{number(seconds / length)} {unit}"
    return f"{number(seconds)} s"


def plural(count: int, noun: str) -> str:
    """``1 client``, ``30 clients``, ``1,200 clients``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _padded(cell: str, width: int, index: int) -> str:
    return cell.ljust(width) if index == 0 else cell.rjust(width)
