"""Row-wise searches and ragged runs against plain NumPy, row by row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedsim.sampling import ranks, runs


@given(num=st.integers(1, 20), columns=st.integers(1, 40), draws=st.integers(0, 30), seed=st.integers(0, 2**32 - 1))
def test_ranks_are_a_binary_search_in_every_row(num, columns, draws, seed):
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.integers(0, 10, (num, columns)) / 10, axis=1)  # with ties, and values that hit an edge
    values = rng.integers(0, 11, (num, draws)) / 10
    brute = [np.searchsorted(row, wanted, side="right") for row, wanted in zip(edges, values, strict=True)]
    np.testing.assert_array_equal(ranks(edges, values), np.array(brute).reshape(values.shape))


@given(widths=st.lists(st.integers(0, 50), max_size=40), cells=st.integers(1, 200))
def test_runs_hold_every_row_once_and_as_many_cells_as_they_may(widths, cells):
    sizes = np.array(widths, np.int64)
    found = list(runs(sizes, cells))
    np.testing.assert_array_equal(np.sort(np.concatenate([*found, np.zeros(0, np.int64)])), np.arange(len(sizes)))
    assert all(len(rows) == 1 or len(rows) * sizes[rows].max() <= cells for rows in found)
