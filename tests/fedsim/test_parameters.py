import numpy as np
import pytest
import torch
from torch import nn

from fedsim.parameters import Layout
from fedsim.randomness import torch_seeded


def test_flatten_and_load_are_inverse_and_views_match_the_module():
    with torch_seeded(0, "m"):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    layout = Layout.of(model)
    vector = layout.flatten(model)
    assert vector.shape == (layout.size,) == (3 * 4 + 4 + 4 * 2 + 2,)
    layout.load(model, vector * 2)
    np.testing.assert_array_equal(layout.flatten(model), vector * 2)
    views = layout.views(torch.from_numpy(np.stack([vector, vector * 2])))
    assert torch.equal(views["2.weight"][1], model[2].weight)


def test_running_statistics_and_mixed_dtypes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\).*running statistics"):
        Layout.of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(ValueError, match="share one dtype"):
        Layout.of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
