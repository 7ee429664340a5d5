"""Which channels the tracer makes structures of, which it refuses, and the reasons it gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.pruning import StructureMap, structure_map

IMAGE = torch.zeros(1, 2, 8, 8)


def blocks(smap: StructureMap) -> dict[str, int]:
    return {block.name: len(block) for block in smap.blocks}


class Using(nn.Module):
    """Layers by name and the forward pass a test is about."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def test_hidden_units_of_an_mlp_are_structures_and_logits_are_not() -> None:
    smap = structure_map(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.zeros(1, 3))
    assert blocks(smap) == {"0": 4, "2": 5}
    assert smap.skipped == {"4": "its channels are outputs of the model"}
    assert [(s.parameter, s.dim, s.indices, s.role) for s in smap.slices(4 + 3)] == [
        ("2.weight", 0, (3,), "producer"),
        ("2.bias", 0, (3,), "producer"),
        ("4.weight", 1, (3,), "consumer"),
    ]
    assert smap.parameters_of[0] == 3 + 1 + 5
    assert (smap.structures[5].block, smap.structures[5].kind, smap.structures[5].index) == ("2", "channel", 1)


def test_a_channel_owns_its_run_of_columns_after_flatten() -> None:
    smap = structure_map(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(12, 2)), IMAGE)
    assert smap.slices(1)[-1].indices == (4, 5, 6, 7)


def test_whole_normalisation_groups_leave() -> None:
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    smap = structure_map(model, IMAGE)
    assert blocks(smap) == {"0": 3, "3": 4}
    assert smap.slices(2)[0].indices == (8, 9, 10, 11)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [(nn.GroupNorm(1, 4), "one group"), (nn.LayerNorm([4, 6, 6]), "LayerNorm"), (nn.Softmax(1), "Softmax"), (nn.PReLU(4), "PReLU")],
)
def test_what_mixes_or_is_not_known_pins_its_channels_with_the_reason(norm: nn.Module, reason: str) -> None:
    smap = structure_map(nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(216, 2)), IMAGE)
    assert blocks(smap) == {"2": 6}
    assert reason in smap.skipped["0"]


def test_a_depthwise_convolution_shares_its_channels_and_other_groups_are_refused() -> None:
    depthwise = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(108, 2))
    assert blocks(structure_map(depthwise, IMAGE)) == {"0": 4, "2": 3}
    grouped = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(108, 2))
    smap = structure_map(grouped, IMAGE)
    assert blocks(smap) == {"2": 3}
    assert "not depthwise" in smap.skipped["0"]
    assert "grouped" in smap.skipped["1"]


def test_a_residual_stream_stays_unless_coupled() -> None:
    model = Using(
        lambda m, x: m.c((h := m.a(x)) + m.b2(F.relu(m.b1(h)))).flatten(1),
        a=nn.Conv2d(2, 6, 1),
        b1=nn.Conv2d(6, 5, 1),
        b2=nn.Conv2d(5, 6, 1),
        c=nn.Conv2d(6, 1, 1),
    )
    smap = structure_map(model, IMAGE)
    assert blocks(smap) == {"b1": 5}
    assert all("couple_residual" in smap.skipped[name] for name in ("a", "b2"))
    coupled = structure_map(model, IMAGE, couple_residual=True)
    assert blocks(coupled) == {"a": 6, "b1": 5}
    assert {(s.parameter, s.dim) for s in coupled.slices(0)} == {
        *{("a.weight", 0), ("a.bias", 0), ("b2.weight", 0), ("b2.bias", 0)},
        *{("b1.weight", 1), ("c.weight", 1)},
    }


def test_a_sum_with_the_input_stays_even_when_coupled() -> None:
    model = Using(lambda m, x: m.c(x + m.b(m.a(x))).flatten(1), a=nn.Conv2d(2, 6, 1), b=nn.Conv2d(6, 2, 1), c=nn.Conv2d(2, 1, 1))
    smap = structure_map(model, IMAGE, couple_residual=True)
    assert blocks(smap) == {"a": 6}
    assert "do not correspond" in smap.skipped["b"]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.d(m.a(x).reshape(x.size(0), 256)), "reshape to a fixed width"),
        (lambda m, x: m.d(m.a(x).permute(0, 2, 3, 1).reshape(x.size(0), -1)), "permute"),
        (lambda m, x: m.d(torch.cat([m.a(x), x], 1)[:, :4].flatten(1)), "cat"),
        (lambda m, x: m.d(m.a(x).flatten(1) / m.a2(x).flatten(1)), "truediv"),
        (lambda m, x: m.d((m.a(x) - m.a(x).mean(1, keepdim=True)).flatten(1)), "used twice"),
        (lambda m, x: m.d(torch.cumsum(m.a(x), 1).flatten(1)), "cumsum"),
    ],
)
def test_operations_that_move_or_mix_channels_are_not_guessed(forward, reason: str) -> None:
    model = Using(forward, a=nn.Conv2d(2, 4, 1), a2=nn.Conv2d(2, 4, 1), d=nn.Linear(256, 2))
    if reason == "used twice":
        with pytest.raises(ValueError, match=r"'a' .Conv2d. is used twice"):
            structure_map(model, IMAGE)
    else:
        smap = structure_map(model, IMAGE)
        assert not smap.blocks
        assert reason in smap.skipped["a"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.d(m.a(x).relu().mean((2, 3))),
        lambda m, x: m.d(torch.mean(F.gelu(m.a(x)), dim=[-1, -2])),
        lambda m, x: m.d(F.adaptive_avg_pool2d(m.a(x) * 0.5 + 1, 1).view(x.shape[0], -1)),
        lambda m, x: m.d(torch.flatten(F.max_pool2d(F.dropout(m.a(x), 0.5, m.training), 8), 1)),
        lambda m, x: m.d(F.avg_pool2d((h := m.a(x)) * torch.sigmoid(h), 8).flatten(1)),
    ],
)
def test_functional_forms_are_followed(forward) -> None:
    model = Using(forward, a=nn.Conv2d(2, 4, 1), d=nn.Linear(4, 2))
    assert blocks(structure_map(model, IMAGE)) == {"a": 4}


def test_a_layer_used_twice_and_a_tied_weight_are_refused_by_name() -> None:
    shared = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"'0.weight' and '2.weight' are one tensor"):
        structure_map(nn.Sequential(shared, nn.ReLU(), shared), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"'a' .Linear. is used twice"):
        structure_map(Using(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Linear(3, 3)), torch.zeros(1, 3))
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"'0.weight' and '2.weight' are one tensor"):
        structure_map(tied, torch.zeros(1, 3))


def test_a_model_with_control_flow_has_no_structures_and_says_so() -> None:
    model = Using(lambda m, x: m.a(x) if x.sum() > 0 else m.a(-x), a=nn.Linear(3, 2))
    smap = structure_map(model, torch.zeros(1, 3))
    assert not smap.blocks
    assert "cannot be traced" in smap.skipped[""]


def test_tracing_leaves_statistics_modes_and_random_numbers_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(256, 2)).train()
    state = torch.get_rng_state()
    assert blocks(structure_map(model, IMAGE)) == {"0": 4}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0


def test_linears_over_tokens_have_channels_in_the_last_axis() -> None:
    model = Using(lambda m, x: m.b(F.gelu(m.a(x))).mean(1), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    smap = structure_map(model, torch.zeros(1, 5, 4))
    assert blocks(smap) == {"a": 6}
    assert {w.name: w.flops for w in smap.weights} == {"a.weight": 10, "a.bias": 0, "b.weight": 10, "b.bias": 0}
