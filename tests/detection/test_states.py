from dataclasses import dataclass

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from detection import DetectorState
from detection.states import columns, from_bytes, mapped, merged, take, to_bytes


@dataclass(frozen=True, eq=False)
class Nested:
    parts: tuple[DetectorState, ...]
    window: np.ndarray


def nested(streams, seed):
    rng = np.random.default_rng(seed)
    parts = tuple(
        DetectorState(rng.standard_normal(streams), rng.integers(9, size=streams).astype(np.int32), np.arange(streams, dtype=np.int32))
        for _ in range(2)
    )
    return Nested(parts=parts, window=rng.standard_normal((streams, 3)))


def test_every_array_of_a_nested_state_has_a_name():
    assert [name for name, _ in columns(nested(4, 0))] == [
        *(f"parts.{k}.{field}" for k in (0, 1) for field in ("statistic", "rising", "clock")),
        "window",
    ]


def test_rows_come_from_the_new_state_where_the_mask_says_so():
    new, old = nested(5, 1), nested(5, 2)
    mask = np.array([True, False, True, False, False])
    both = merged(mask, new, old)
    assert to_bytes(take(both, mask)) == to_bytes(take(new, mask))
    assert to_bytes(take(both, ~mask)) == to_bytes(take(old, ~mask))


def test_bytes_bring_back_every_bit_whatever_the_number_of_streams():
    state = nested(6, 3)
    state.window[0, 0] = -0.0
    back = from_bytes(to_bytes(state), like=nested(1, 0))
    assert isinstance(back.parts[1], DetectorState)
    for (_, first), (_, second) in zip(columns(state), columns(back), strict=True):
        assert first.dtype == second.dtype
        assert_array_equal(first.view(np.uint8), second.view(np.uint8))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda data: b"x" * len(data)])
def test_damaged_bytes_are_refused(damage):
    with pytest.raises(ValueError, match="damaged"):
        from_bytes(damage(to_bytes(nested(2, 0))), like=nested(1, 0))


def test_bytes_of_another_state_are_refused():
    with pytest.raises(ValueError, match="must hold a state of"):
        from_bytes(to_bytes(nested(2, 0).parts[0]), like=nested(1, 0))
    with pytest.raises(ValueError, match="must hold a state of"):
        from_bytes(to_bytes(mapped(nested(2, 0), lambda column: column.astype(np.float32))), like=nested(1, 0))


def test_a_state_of_objects_is_not_stored():
    with pytest.raises(ValueError, match="holds Python objects"):
        to_bytes((np.array([object()]),))
