import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim import encoding
from fedsim.errors import CheckpointError
from fedsim.parameters import Layout

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain)
def test_any_plain_value_survives_encoding(value):
    tree, arrays = encoding.encode(value)
    assert encoding.decode(tree, arrays) == value


def test_arrays_dataclasses_classes_paths_and_nan_survive_a_file(tmp_path):
    value = {
        "x": np.arange(6.0).reshape(2, 3),
        "layout": Layout(("w",), ((2, 3),), "float32"),
        "cls": Layout,
        "path": Path("a"),
        "nan": math.nan,
    }
    encoding.save(tmp_path / "v.npz", value)
    back = encoding.load(tmp_path / "v.npz")
    np.testing.assert_array_equal(back.pop("x"), value.pop("x"))
    assert math.isnan(back.pop("nan"))
    value.pop("nan")
    assert back == value


def test_equal_values_have_equal_digests_and_a_changed_bit_another():
    x = np.arange(4.0)
    y = x.copy()
    assert encoding.digest(x, "a") == encoding.digest(y, "a")
    y[2] = np.nextafter(y[2], 9)
    assert encoding.digest(x, "a") != encoding.digest(y, "a")
    assert encoding.digest((1, 2)) != encoding.digest([1, 2])


def test_a_damaged_file_is_refused_or_harmless_wherever_the_damage_is(tmp_path):
    path = tmp_path / "v.npz"
    encoding.save(path, {"x": np.arange(100.0)})
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            value = encoding.load(path)
        except CheckpointError:
            refused += 1
        else:  # a time stamp or an attribute of the archive, which carries no content
            np.testing.assert_array_equal(value["x"], np.arange(100.0))
    assert refused > 0.8 * len(range(0, len(content), 3))


def test_a_truncated_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "v.npz"
    encoding.save(path, {"x": np.arange(100.0)})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="damaged"):
        encoding.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        encoding.load(tmp_path / "absent.npz")


def test_a_stored_value_cannot_name_code_of_other_packages():
    with pytest.raises(CheckpointError, match="trusted"):
        encoding.decode({"name": "os:system"}, {})
    with pytest.raises(CheckpointError, match="not a dataclass"):
        encoding.decode({"type": "fedsim.encoding:load", "fields": {}}, {})


@dataclass(frozen=True)
class Holder:
    callback: object


def test_what_has_no_stored_form_is_named_with_its_path():
    with pytest.raises(TypeError, match="import path"):
        encoding.encode(Holder(lambda: 0))
    with pytest.raises(TypeError, match=r"value\.callback: a .*Generator has no stored form"):
        encoding.encode(Holder(np.random.default_rng()))


def test_a_failed_write_leaves_the_old_file_and_no_fragment(tmp_path, monkeypatch):
    path = tmp_path / "v.npz"
    encoding.save(path, 1)
    monkeypatch.setattr(encoding.os, "fsync", _full_disk)
    with pytest.raises(CheckpointError, match="No space"):
        encoding.save(path, 2)
    assert encoding.load(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["v.npz"]


def _full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")
