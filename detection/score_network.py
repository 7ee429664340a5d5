"""A law whose score is a small smooth network, evaluated with PyTorch. Exports ``ScoreNetwork``; ``fit_score`` learns one."""

# N observations, D dimensions, M probes

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from detection.laws import Array, ByValue, ScoredLaw, observations, read_only

SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {"softplus": nn.functional.softplus, "silu": nn.functional.silu, "tanh": torch.tanh}
EXACT = 16  # dimensions up to which the divergence is exact: one vector-Jacobian product for each
_BLOCK = 8192  # observations differentiated at once
_FORMAT = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreNetwork(ScoredLaw, ByValue):
    """A network for the score of standardised observations ``u = (x - centre) / scale``: a linear map plus an MLP, ``s_u = u L + mlp(u)``.

    ``weights`` (in, out) and ``biases`` (out,) of each layer, ``linear`` (D, D), ``centre`` and ``scale`` (D,); ``dimension`` is 0 for
    numbers (D = 1). The Laplacian is exact up to 16 dimensions; above, it is Hutchinson's estimate from ``probes`` random signs, a fixed
    function of the observation, whose variance :meth:`laplacian_variance` reports. Rounding may depend on the batch, to about 1e-15.
    ``data`` are the observations it was fitted to; ``noise`` (in units of ``scale``) is what was added to them. ``device`` is where it is
    evaluated, in float64. A score that is learned need not be the gradient of anything, nor need its normalising constant exist.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    linear: Array
    centre: Array
    scale: Array
    dimension: int = 0
    activation: str = "softplus"
    noise: float = 0.0
    data: Array | None = None
    probes: int = 16
    device: str = field(default="cpu", compare=False)

    def __post_init__(self) -> None:
        check_activation(self.activation)
        for name in ("weights", "biases"):
            object.__setattr__(self, name, tuple(read_only(part) for part in getattr(self, name)))
        for name in ("linear", "centre", "scale"):
            object.__setattr__(self, name, read_only(getattr(self, name)))
        if self.data is not None:
            object.__setattr__(self, "data", read_only(observations(self.data, self.dimension)))
        self._check_shapes()
        numbers = [*self.weights, *self.biases, self.linear, self.centre, self.scale, np.array(self.noise)]
        if not all(np.isfinite(part).all() for part in numbers) or not (self.scale > 0).all() or self.noise < 0 or self.probes < 1:
            raise ValueError(
                "weights must be finite, scale positive, noise at least 0 and probes at least 1; the training may have diverged"
            )

    def score(self, x: ArrayLike) -> Array:
        """The learned score, shaped like ``x``."""
        x = observations(x, self.dimension)
        with torch.no_grad():
            parts = [self._net.score(rows).cpu().numpy() / self.scale for rows in self._blocks(x)]
        return np.concatenate([np.empty((0, len(self.scale))), *parts]).reshape(x.shape)

    def laplacian_variance(self, x: ArrayLike) -> Array:
        """Estimated variance of the Laplacian's estimate at each observation; 0 up to 16 dimensions, ``nan`` with a single probe."""
        x = observations(x, self.dimension)
        shape = x.shape[:-1] if self.dimension else x.shape
        if len(self.scale) <= EXACT:
            return np.zeros(shape)
        if self.probes == 1:
            return np.full(shape, np.nan)
        traces = [self._traces(rows)[1].var(dim=0, correction=1).cpu().numpy() / self.probes for rows in self._blocks(x)]
        return np.concatenate([np.empty(0), *traces]).reshape(shape)

    def sample(self, rng: np.random.Generator, num: int) -> Array:
        """``num`` draws of the training data plus the training noise: with denoising, draws of the very law whose score was learned.

        Raises ``ValueError`` for a network without ``data``: a score alone has no sampler.
        """
        if self.data is None:
            raise ValueError("a learned score has no sampler of its own; give it data with dataclasses.replace(law, data=...)")
        chosen: Array = self.data[rng.integers(len(self.data), size=num)]
        scale = self.scale if self.dimension else self.scale[0]
        return chosen + self.noise * scale * rng.standard_normal(chosen.shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but ``device`` to ``path``, a NumPy archive without pickles; a file that is there is replaced whole."""
        arrays: dict[str, Any] = {f"weight_{k}": part for k, part in enumerate(self.weights)}
        arrays |= {f"bias_{k}": part for k, part in enumerate(self.biases)}
        names = ("linear", "centre", "scale", "dimension", "activation", "noise", "probes")
        arrays |= {name: np.asarray(getattr(self, name)) for name in names}
        if self.data is not None:
            arrays["data"] = self.data
        target = Path(path)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with draft.open("wb") as file:
                np.savez(file, allow_pickle=False, format=np.array(_FORMAT), layers=np.array(len(self.weights)), **arrays)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "cpu") -> Self:
        """The network that was saved at ``path``. Raises ``ValueError`` for a file that is damaged or of another kind."""
        with Path(path).open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    arrays = {name: archive[name] for name in archive.files}
                if int(arrays["format"]) != _FORMAT:
                    raise ValueError(f"format must be {_FORMAT}, got {arrays['format']}")
                layers = range(int(arrays["layers"]))
                return cls(
                    weights=tuple(arrays[f"weight_{k}"] for k in layers),
                    biases=tuple(arrays[f"bias_{k}"] for k in layers),
                    linear=arrays["linear"],
                    centre=arrays["centre"],
                    scale=arrays["scale"],
                    dimension=int(arrays["dimension"]),
                    activation=str(arrays["activation"]),
                    noise=float(arrays["noise"]),
                    data=arrays.get("data"),
                    probes=int(arrays["probes"]),
                    device=device,
                )
            except Exception as error:  # a damaged archive fails in many ways, from zip headers to array shapes
                raise ValueError(f"{path} must be a score network written by save, undamaged: {error}") from error

    def _terms(self, x: Array) -> tuple[Array, Array]:
        scores, traces = [np.empty((0, len(self.scale)))], [np.empty(0)]
        for rows in self._blocks(x):
            score, trace = self._traces(rows)
            scores.append(score.cpu().numpy() / self.scale)
            traces.append(trace.mean(dim=0).cpu().numpy())
        return np.concatenate(scores).reshape(x.shape), np.concatenate(traces).reshape(x.shape[:-1] if self.dimension else x.shape)

    def _traces(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, D) in standard units, and traces in those of ``x``: exact (1, N), or from each probe (M, N)."""
        rows = rows.requires_grad_()
        score = self._net.score(rows)
        scale = torch.as_tensor(self.scale.copy(), device=rows.device)
        exact = len(self.scale) <= EXACT
        probes = torch.eye(len(self.scale), dtype=torch.float64, device=rows.device)[:, None] if exact else _signs(rows, self.probes)
        parts = []
        for probe in probes:
            pull = (probe / scale).expand_as(score)
            parts.append((torch.autograd.grad(score, rows, pull, retain_graph=True)[0] * pull).sum(dim=1))
        traces = torch.stack(parts)
        return score.detach(), traces.sum(dim=0, keepdim=True) if exact else traces

    def _blocks(self, x: Array) -> list[Tensor]:
        standard = (x.reshape(-1, len(self.scale)) - self.centre) / self.scale
        return [torch.as_tensor(standard[i : i + _BLOCK], device=device_of(self.device)) for i in range(0, len(standard), _BLOCK)]

    @cached_property
    def _net(self) -> "Network":
        net = Network(self.weights, self.biases, self.linear, self.activation).to(device_of(self.device))
        return net.requires_grad_(False)

    def _check_shapes(self) -> None:
        size = max(self.dimension, 1)
        ends = [size, *(part.shape[-1] for part in self.biases)]
        fits = (
            len(self.weights) > 0
            and [part.shape for part in self.weights] == list(pairwise(ends))
            and all(part.ndim == 1 for part in self.biases)
            and (ends[-1], self.linear.shape, self.centre.shape, self.scale.shape) == (size, (size, size), (size,), (size,))
            and (self.data is None or (self.data.size > 0 and self.data.ndim == (2 if self.dimension else 1)))
        )
        if not fits:
            raise ValueError(
                f"weights and biases must lead from {size} numbers to {size}, and linear, centre, scale and data must fit them"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self)}


class Network(nn.Module):
    """``u L + mlp(u)``, (N, D) to (N, D)."""

    def __init__(self, weights: Sequence[Array], biases: Sequence[Array], linear: Array, activation: str) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.tensor(part) for part in weights])
        self.biases = nn.ParameterList([torch.tensor(part) for part in biases])
        self.linear = nn.Parameter(torch.tensor(linear))
        self.smooth = SMOOTH[activation]

    def score(self, u: Tensor) -> Tensor:
        h = u
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = (self.smooth(h) if k else h) @ weight + bias
        return h + u @ self.linear


def _signs(rows: Tensor, probes: int) -> Tensor:
    """Random signs (M, N, D) hashed from the bits of each row: independent between rows, and the same whenever a row is seen again."""
    bits: NDArray[np.uint64] = rows.detach().cpu().numpy().view(np.uint64)
    key: Any = np.zeros(len(bits), np.uint64)
    for column in bits.T:
        key = _mixed(key ^ column)
    count = np.arange(1, probes * bits.shape[1] + 1, dtype=np.uint64).reshape(probes, 1, -1)
    odd = _mixed(key[:, None] + count * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(63)
    return torch.as_tensor(2.0 * odd.astype(np.float64) - 1.0, device=rows.device)


def _mixed(key: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def check_activation(activation: str) -> None:
    if activation not in SMOOTH:
        raise ValueError(
            f"activation must be smooth, one of {tuple(SMOOTH)}, got {activation!r}: with kinks, as in relu, the score's Jacobian is "
            "piecewise constant and the Laplacian says nothing"
        )


def device_of(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices are); use device='cpu'")
    return device
