"""Pictures from files, arrays and column-wise data sets: all sources give the same examples, bad ones a clear error."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fedsim.encoding import decode, encode
from fedsim.tasks.base import Dataset
from fedsim.tasks.images import Images, Pictures

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 8, 12, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, pictures: list[Any], labels: Any, struct: bool = True, **names: str) -> Path:
    cells = [{"bytes": p, "path": None} for p in pictures] if struct else pictures
    pq.write_table(pa.table({names.get("img", "img"): cells, names.get("label", "label"): labels}), path)
    return path


class Columns:
    """Stands in for a Hugging Face ``Dataset``: columns by name, and ``features``."""

    def __init__(self, **columns: Any):
        self.columns = columns
        self.features = dict.fromkeys(columns)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]


def sources(folder: Path) -> dict[str, Any]:
    pictures = [encoded(p) for p in PIXELS]
    return {
        "parquet": write(folder / "a.parquet", pictures, LABELS),
        "plain bytes": str(write(folder / "b.parquet", pictures, LABELS.astype(np.uint8), struct=False)),
        "two files": [write(folder / "c.parquet", pictures[:25], LABELS[:25]), write(folder / "d.parquet", pictures[25:], LABELS[25:])],
        "arrays": (PIXELS, LABELS),
        "channels first": (PIXELS.transpose(0, 3, 1, 2), list(LABELS)),
        "floats": (PIXELS / 255.0, LABELS),
        "wide integers": Pictures(PIXELS.astype(np.int64), LABELS),
        "data set": Columns(img=[Image.fromarray(p) for p in PIXELS], label=LABELS.tolist()),
    }


def test_all_sources_give_the_same_examples(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        task = Images(train=source, test=(PIXELS[:4], LABELS[:4]))
        train, test = task.data()
        assert train.inputs.dtype == np.float32
        np.testing.assert_allclose(train.inputs, PIXELS.transpose(0, 3, 1, 2) / 255.0, atol=1e-7, err_msg=name)
        np.testing.assert_array_equal(train.targets, LABELS)
        assert len(test) == 4
        assert task.num_classes == 4
        np.testing.assert_array_equal(task.example, train.inputs[:1])


def test_grey_pictures_have_one_channel(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    for source in ((grey, LABELS), (grey[..., None], LABELS), write(tmp_path / "grey.parquet", [encoded(p) for p in grey], LABELS)):
        task = Images(train=source)
        assert task.example.shape == (1, 1, 8, 12)
        assert task.logits(task.build(0), task.example).shape == (1, 4)


def test_without_a_test_source_a_share_of_every_label_is_held_out() -> None:
    train, test = Images(train=(PIXELS, LABELS), test_share=0.3).data()
    np.testing.assert_array_equal(np.bincount(test.targets), 3)
    rows = np.concatenate([train.inputs, test.inputs]).reshape(40, -1)
    assert len(np.unique(rows, axis=0)) == 40


def test_limits_keep_a_random_subset_that_the_seed_decides(tmp_path: Path) -> None:
    source = sources(tmp_path)["parquet"]

    def kept(seed: int) -> Dataset:
        return Images(train=source, test=(PIXELS, LABELS), train_limit=10, test_limit=5, seed=seed).data().train

    assert len(kept(0)) == 10
    np.testing.assert_array_equal(kept(0).inputs, kept(0).inputs)
    assert not np.array_equal(kept(0).inputs, kept(1).inputs)


def test_a_task_survives_encoding_whatever_its_source(tmp_path: Path) -> None:
    for source in sources(tmp_path).values():
        task = Images(train=source, model="resnet9", width=8)
        again = decode(*encode(task))
        np.testing.assert_array_equal(again.data().train.inputs, task.data().train.inputs)
        assert again.num_classes == task.num_classes


def test_equal_paths_are_equal_tasks_and_share_their_data(tmp_path: Path) -> None:
    path = sources(tmp_path)["parquet"]
    assert Images(train=path) == Images(train=str(path))
    assert Images(train=path).data() is Images(train=str(path)).data()


def test_building_a_model_reads_one_picture_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Images(train=sources(tmp_path)["parquet"], model="resnet9", width=8)
    monkeypatch.setattr(Images, "load", lambda self: pytest.fail("the data set was loaded"))
    assert task.logits(task.build(0), task.example).shape == (1, 4)


def nan_pictures() -> NDArray[np.float32]:
    pictures = PIXELS.astype(np.float32) / 255
    pictures[[7, 9], 0, 0, 0] = np.nan
    return pictures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": (nan_pictures(), LABELS)}, r"pictures\[7\] is not finite \(2 of 40"),
        ({"train": (PIXELS.astype(np.float32), LABELS)}, r"must lie in \[0, 1\]; picture 0"),
        ({"train": (PIXELS.astype(np.int64) - 1, LABELS)}, r"must lie in \[0, 255\]"),
        ({"train": (PIXELS, LABELS[:9])}, "one integer for each of 40 pictures"),
        ({"train": (PIXELS, LABELS / 2)}, "one integer for each"),
        ({"train": (PIXELS, LABELS), "num_classes": 3}, r"labels must lie in 0\.\.2 \(num_classes=3\), got 3 at index 3"),
        ({"train": (PIXELS, LABELS - 1)}, "got -1 at index 0"),
        ({"train": (PIXELS, LABELS), "test": (PIXELS, LABELS + 5)}, r"0\.\.3 .*got 5 at index 0"),
        ({"train": (PIXELS.reshape(40, -1), LABELS)}, "got shape"),
        ({"train": (PIXELS[:0], LABELS[:0])}, "no pictures"),
        ({"train": Columns(picture=[], label=[])}, "no column 'img'; its columns are picture, label"),
        ({"train": 5}, "got a int"),
        ({"train": (PIXELS, LABELS), "model": "vgg"}, "choose from cnn, resnet9"),
        ({"train": (PIXELS, LABELS), "train_limit": 0}, "train_limit must be at least 1"),
        ({"train": (PIXELS, LABELS), "num_classes": 1}, "num_classes must be at least 2"),
    ],
)
def test_bad_pictures_and_labels_are_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Images(**arguments)


def test_bad_files_are_refused_naming_what_is_wrong(tmp_path: Path) -> None:
    good = sources(tmp_path)["parquet"]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet"):
        Images(train=tmp_path / "nowhere.parquet")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet"):
        Images(train=good, test=tmp_path / "nowhere.parquet").data()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken\.parquet is not a readable Parquet file"):
        Images(train=tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match="no column 'class'; its columns are img, label"):
        Images(train=good, label_column="class")
    with pytest.raises(ValueError, match=r"0\.\.2 .*got 3 at index 3"):
        Images(train=good, num_classes=3).data()
    garbled = [encoded(p) for p in PIXELS[:5]]
    garbled[3] = b"noise"
    with pytest.raises(ValueError, match="picture 3 cannot be decoded"):
        Images(train=write(tmp_path / "garbled.parquet", garbled, LABELS[:5]), test=good).data()
    odd = [encoded(PIXELS[0]), encoded(PIXELS[1, :4])]
    with pytest.raises(ValueError, match="picture 1 is"):
        Images(train=write(tmp_path / "odd.parquet", odd, [0, 1]), test=good).data()
    with pytest.raises(ValueError, match="must hold integers without gaps"):
        Images(train=write(tmp_path / "gaps.parquet", odd, [0, None]))
    with pytest.raises(ValueError, match="one shape, got"):
        Images(train=good, test=(PIXELS[:, :4], LABELS)).data()


def test_the_small_cnn_learns_which_half_is_bright() -> None:
    labels = np.arange(200) % 2
    pictures = RNG.random((200, 8, 8)) * 0.5
    pictures[labels == 1, :4] += 0.5
    pictures[labels == 0, 4:] += 0.5
    task = Images(train=(pictures, labels), width=4)
    (train, test), model = task.data(), task.build(0)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(60):
        optimiser.zero_grad()
        task.losses(model, train.batch(np.arange(32 * step, 32 * step + 32) % len(train))).mean().backward()
        optimiser.step()
    assert task.correct(model, test.batch(np.arange(len(test)))).mean() > 0.95
