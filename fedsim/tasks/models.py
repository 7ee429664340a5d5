"""Small models that can be traced and pruned: every operation is a module or a sum, and no layer keeps running statistics.

Exports :func:`mlp`, :func:`digits_cnn`, :func:`cifar_cnn` and :class:`ResNet9`.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

_GROUP = 8  # channels of a normalisation group: the unit in which normalised channels can be pruned


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of ``sizes`` (inputs first, classes last) with ReLU between them.

    >>> [tuple(p.shape) for p in mlp((64, 32, 10)).parameters()]
    [(32, 64), (32,), (10, 32), (10,)]
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least two positive widths, got {tuple(sizes)!r}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits_cnn(num_classes: int = 10) -> nn.Sequential:
    """Two convolutions (24, 48 channels) and a dense layer of 48 for pictures (1, 8, 8).

    Average pooling: its gradient has no ties, so batched and single clients agree to rounding.
    """
    return nn.Sequential(
        *_convolution(1, 24, nn.AvgPool2d(2)),
        *_convolution(24, 48, nn.AvgPool2d(2)),
        nn.Flatten(),
        nn.Linear(4 * 48, 48),
        nn.ReLU(),
        nn.Linear(48, num_classes),
    )


def cifar_cnn(shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Two convolutions (``width`` and twice that), each halving the picture ``shape`` (channels, height, width), and a dense layer of 64."""
    channels, height, breadth = shape
    if min(height, breadth) < 4:
        raise ValueError(f"the model halves its pictures twice, so they need at least 4 x 4 pixels, got {height} x {breadth}")
    return nn.Sequential(
        Centred(),
        *_convolution(channels, width, nn.MaxPool2d(2)),
        *_convolution(width, 2 * width, nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (breadth // 4), 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


class Centred(nn.Module):
    """Pixels of [0, 1] to zero mean and near unit variance, as natural pictures have; without it small CNNs learn far more slowly."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) * 4.0


class ResNet9(nn.Module):
    """Nine-layer residual network with group normalisation (groups of 8 channels) for pictures of at least 8 x 8 pixels.

    Batch normalisation would mix the examples of a client and keep statistics that clients cannot average (Hsieh et al. 2020, arXiv:1910.00189).
    """

    def __init__(self, channels: int = 3, num_classes: int = 10, width: int = 64):
        super().__init__()
        if width < _GROUP or width % _GROUP:
            raise ValueError(f"width must be a positive multiple of {_GROUP}, the channels of a normalisation group, got {width}")
        self.centred = Centred()
        self.stem = _normalised(channels, width)
        self.stage1 = nn.Sequential(_normalised(width, 2 * width), nn.MaxPool2d(2))
        self.residual1 = nn.Sequential(_normalised(2 * width, 2 * width), _normalised(2 * width, 2 * width))
        self.stage2 = nn.Sequential(_normalised(2 * width, 4 * width), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(_normalised(4 * width, 8 * width), nn.MaxPool2d(2))
        self.residual2 = nn.Sequential(_normalised(8 * width, 8 * width), _normalised(8 * width, 8 * width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(self.centred(x)))
        x = x + self.residual1(x)
        x = self.stage3(self.stage2(x))
        x = x + self.residual2(x)
        logits: Tensor = self.head(self.flatten(self.pool(x)))
        return logits


def _convolution(fan_in: int, fan_out: int, pool: nn.Module) -> tuple[nn.Module, ...]:
    return nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU(), pool


def _normalised(fan_in: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.GroupNorm(fan_out // _GROUP, fan_out), nn.ReLU())
