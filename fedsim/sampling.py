"""Array forms of small searches that many clients make at once, in runs that fit a modest amount of memory.

Exports :func:`ranks` and :func:`runs`.
"""

# n clients, V edges of a law, k draws

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_CELLS = 2**20


def ranks(edges: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of a row's ascending ``edges`` (n, V) are at most each of the row's ``values`` (n, k): ``searchsorted(side="right")``, row by row.

    >>> ranks(np.array([[0.2, 0.7], [0.5, 0.5]]), np.array([[0.1, 0.7], [0.4, 0.6]])).tolist()
    [[0, 2], [0, 2]]
    """
    low = np.zeros(values.shape, np.int64)
    high = np.full(values.shape, edges.shape[1])
    for _ in range(int(edges.shape[1]).bit_length()):
        middle = (low + high) >> 1
        at_most = np.take_along_axis(edges, np.minimum(middle, edges.shape[1] - 1), axis=1) <= values
        at_most &= low < high
        low = np.where(at_most, middle + 1, low)
        high = np.where(at_most, high, middle)
    return low


def runs(widths: NDArray[np.int64], cells: int = _CELLS) -> Iterator[NDArray[np.int64]]:
    """Rows of a ragged table of ``widths`` (n,), each once, widest first, in groups that padded to their widest hold at most ``cells`` entries."""
    order = np.argsort(-widths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, cells // max(1, int(widths[order[start]])))
        yield order[start : start + count]
        start += count
