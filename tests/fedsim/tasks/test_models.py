"""Models that the rest can rely on: traceable, free of running statistics, equal for single and batched clients."""

import pytest
import torch
from torch import nn

from fedsim.parameters import Layout
from fedsim.tasks.models import ResNet9, cifar_cnn, digits_cnn, mlp

MODELS = [
    pytest.param(lambda: mlp((64, 32, 16, 10)), (64,), id="mlp"),
    pytest.param(digits_cnn, (1, 8, 8), id="digits_cnn"),
    pytest.param(lambda: cifar_cnn((3, 32, 32), 10, 8), (3, 32, 32), id="cifar_cnn"),
    pytest.param(lambda: ResNet9(3, 10, 16), (3, 32, 32), id="resnet9"),
]


@pytest.mark.parametrize(("build", "shape"), MODELS)
def test_a_traced_model_computes_the_same(build: object, shape: tuple[int, ...]) -> None:
    model, inputs = build(), torch.rand(3, *shape)  # type: ignore[operator]
    assert torch.equal(torch.fx.symbolic_trace(model)(inputs), model(inputs))


@pytest.mark.parametrize(("build", "shape"), MODELS)
def test_every_parameter_is_used_and_no_layer_keeps_statistics(build: object, shape: tuple[int, ...]) -> None:
    model = build()  # type: ignore[operator]
    model(torch.rand(4, *shape)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not list(model.buffers())
    assert Layout.of(model).size == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("build", "shape"), MODELS)
def test_an_example_does_not_see_its_neighbours(build: object, shape: tuple[int, ...]) -> None:
    model, inputs = build(), torch.rand(5, *shape)  # type: ignore[operator]
    torch.testing.assert_close(torch.cat([model(x[None]) for x in inputs]), model(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("build", "shape"), MODELS)
def test_batched_clients_have_the_gradients_of_single_ones(build: object, shape: tuple[int, ...]) -> None:
    model, inputs, targets = build(), torch.rand(2, 3, *shape), torch.tensor([[1, 2, 3], [4, 5, 6]])  # type: ignore[operator]
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    gradient = torch.func.grad(loss)
    batched = torch.func.vmap(gradient, in_dims=(None, 0, 0))(parameters, inputs, targets)
    for client in range(2):
        single = gradient(parameters, inputs[client], targets[client])
        for name in single:
            torch.testing.assert_close(batched[name][client], single[name], atol=1e-4, rtol=1e-3)


def test_resnet9_has_its_parameters_and_whole_groups_of_eight_channels() -> None:
    model = ResNet9(3, 10, 64)
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    assert Layout.of(model).size == sum(9 * i * o + 2 * o for i, o in convolutions) + 512 * 10 + 10
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 8
    assert all(m.num_channels == 8 * m.num_groups for m in norms)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        ResNet9(3, 10, 12)
    with pytest.raises(ValueError, match="at least 4 x 4"):
        cifar_cnn((1, 3, 8))
    with pytest.raises(ValueError, match="two positive widths"):
        mlp((64,))
