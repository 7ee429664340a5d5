"""scikit-learn's 1,797 handwritten digits, optionally in several domains: the task that needs no download."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsim.randomness import rng_for, torch_seeded
from fedsim.tasks.base import Dataset, Splits, Task, check_share, hold_out
from fedsim.tasks.models import digits_cnn, mlp

Pixels = NDArray[np.float64]  # (N, 8, 8) in [0, 1]

_MODELS = ("mlp", "cnn")
_DTYPES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Digits(Task):
    """Pictures in [0, 1], (64,) for the MLP and (1, 8, 8) for the CNN, in each of ``domains``.

    The base pictures are split once (``test_share`` of every digit is held out), then each appears in every domain: as it is
    ("upright"), turned by 90 degrees ("rotated"), as its negative ("inverted"), or with clipped Gaussian noise of standard
    deviation ``noise``, drawn once ("noisy"). Keys: "label", "domain" (index into ``domains``) and "picture" (the base picture).

    >>> len(Digits().data().train), len(Digits().data().test)
    (1293, 504)
    """

    model: str = "mlp"
    hidden: tuple[int, ...] = (256, 256)
    domains: tuple[str, ...] = ("upright",)
    noise: float = 0.3
    dtype: str = "float32"
    test_share: float = 0.28
    seed: int = 0

    num_classes = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        object.__setattr__(self, "domains", tuple(self.domains))
        _check_choice("model", self.model, _MODELS)
        _check_choice("dtype", self.dtype, _DTYPES)
        for domain in self.domains:
            _check_choice("domains", domain, tuple(_DOMAINS))
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains must name at least one domain and none twice, got {self.domains!r}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must hold positive widths, got {self.hidden!r}")
        if not 0.0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be a finite standard deviation >= 0, got {self.noise!r}")
        check_share("test_share", self.test_share)

    @property
    def domain_names(self) -> tuple[str, ...]:
        return self.domains

    def load(self) -> Splits:
        from sklearn.datasets import load_digits

        pictures, labels = load_digits(return_X_y=True)
        pixels = pictures.reshape(-1, 8, 8) / 16.0
        worlds = np.stack([_DOMAINS[domain](pixels, self) for domain in self.domains])
        train, test = hold_out(labels, self.test_share, rng_for(self.seed, "digits", "split"))
        return Splits(self._dataset(worlds, labels, train), self._dataset(worlds, labels, test))

    def build(self, seed: int) -> nn.Module:
        with torch_seeded(seed, "model"):
            model = mlp((64, *self.hidden, 10)) if self.model == "mlp" else digits_cnn()
        return model.double() if self.dtype == "float64" else model

    def _dataset(self, worlds: Pixels, labels: NDArray[np.int64], chosen: NDArray[np.int64]) -> Dataset:
        """The ``chosen`` base pictures of every world (domains, N, 8, 8), one domain after another."""
        shape = (64,) if self.model == "mlp" else (1, 8, 8)
        repeated = np.tile(chosen, len(worlds))
        domain = np.repeat(np.arange(len(worlds)), len(chosen))
        targets = labels[repeated].astype(np.int64)
        return Dataset(
            worlds[domain, repeated].reshape(-1, *shape).astype(self.dtype),
            targets,
            {"label": targets, "domain": domain, "picture": repeated},
        )


def _noisy(pixels: Pixels, task: Digits) -> Pixels:
    # drawn for all base pictures in their order, so neither the split nor the other domains change a picture's noise
    noise = rng_for(task.seed, "digits", "noise").standard_normal(pixels.shape)
    return np.clip(pixels + task.noise * noise, 0.0, 1.0)


_DOMAINS: dict[str, Callable[[Pixels, Digits], Pixels]] = {
    "upright": lambda pixels, task: pixels,
    "rotated": lambda pixels, task: np.rot90(pixels, axes=(1, 2)),
    "inverted": lambda pixels, task: 1.0 - pixels,
    "noisy": _noisy,
}


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is unknown; choose from {', '.join(allowed)}")
