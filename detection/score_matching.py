"""Learning a score from observations: denoising, sliced and exact score matching of small smooth networks. Needs PyTorch.

Denoising: Vincent (2011). Sliced: Song, Garg, Shi, Ermon (2019). Exact: Hyvarinen (2005). Exports ``fit_score`` and ``ScoreNetwork``.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import cos, pi, sqrt

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from detection.laws import Array
from detection.score_network import EXACT, Network, ScoreNetwork, check_activation, device_of

__all__ = ["ScoreNetwork", "fit_score"]


def fit_score(
    data: ArrayLike,
    *,
    method: str = "denoising",
    hidden: Sequence[int] = (64, 64),
    sigma: float = 0.1,
    steps: int = 1500,
    batch: int = 512,
    rate: float = 2e-3,
    activation: str = "softplus",
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> ScoreNetwork:
    """Learn the score of the law behind ``data`` (n,) or (n, d): ``steps`` of Adam on batches of ``batch``, the rate falling as a cosine.

    ``"denoising"`` learns the law of ``data`` plus noise of ``sigma`` standard deviations (antithetic pairs), and needs no derivatives;
    ``"sliced"`` and ``"exact"`` (up to 16 dimensions) learn the law itself, cost more a step, and overfit sooner where data are few.
    ``progress(step, loss)`` is called every 100 steps. On a CPU the result is a function of ``seed``. Raises ``ValueError`` for an activation that
    is not smooth, data that are not finite or do not vary, a device that is not there, and training that diverges.
    """
    check_activation(activation)
    x = _checked(data)
    if method not in _LOSSES:
        raise ValueError(f"method must be one of {tuple(_LOSSES)}, got {method!r}")
    if method == "exact" and x.shape[1] > EXACT:
        raise ValueError(f"method='exact' takes one derivative for each dimension, at most {EXACT}, got {x.shape[1]}; use 'sliced'")
    if not (sigma > 0 and rate > 0 and steps > 0 and batch > 0 and hidden and min(hidden) > 0):
        raise ValueError(f"sigma, rate, steps, batch and hidden must be positive, got {(sigma, rate, steps, batch, tuple(hidden))}")
    centre, scale = x.mean(axis=0), x.std(axis=0)
    place = device_of(device)
    standard = torch.as_tensor((x - centre) / scale, dtype=torch.float32, device=place)
    net = _fresh_net(x.shape[1], hidden, activation, seed).float().to(place)
    generator = torch.Generator(place).manual_seed(seed)
    _train(net, lambda rows: _LOSSES[method](net, rows, sigma, generator), standard, steps, batch, rate, generator, progress)
    return ScoreNetwork(
        weights=tuple(part.detach().cpu().numpy() for part in net.weights),
        biases=tuple(part.detach().cpu().numpy() for part in net.biases),
        linear=net.linear.detach().cpu().numpy(),
        centre=centre,
        scale=scale,
        dimension=np.asarray(data).shape[1] if np.ndim(data) == 2 else 0,
        activation=activation,
        noise=sigma if method == "denoising" else 0.0,
        data=np.asarray(data, dtype=np.float64),
        device=device,
    )


def _fresh_net(size: int, hidden: Sequence[int], activation: str, seed: int) -> Network:
    """A network that starts as the score of a standard normal law: what standardised observations look like from afar."""
    rng = np.random.default_rng(seed)
    ends = [size, *hidden]
    weights = [rng.uniform(-1.0, 1.0, (a, b)) / sqrt(a) for a, b in pairwise(ends)]
    biases = [rng.uniform(-1.0, 1.0, b) / sqrt(a) for a, b in pairwise(ends)]
    return Network([*weights, np.zeros((ends[-1], size))], [*biases, np.zeros(size)], -np.eye(size), activation)


def _train(
    net: Network,
    loss_of: Callable[[Tensor], Tensor],
    data: Tensor,
    steps: int,
    batch: int,
    rate: float,
    generator: torch.Generator,
    progress: Callable[[int, float], None] | None,
) -> None:
    adam = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.5 * (1.0 + cos(pi * step / steps)))
    for step in range(1, steps + 1):
        rows = data[torch.randint(len(data), (batch,), generator=generator, device=data.device)]
        adam.zero_grad()
        loss = loss_of(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        schedule.step()
        if progress is not None and step % 100 == 0:
            progress(step, loss.item())


def _denoising(net: Network, rows: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """``E |sigma s(u + sigma e) + e|^2 / 2`` over ``e`` and ``-e``."""
    e = torch.randn(rows.shape, generator=generator, device=rows.device)
    e = torch.cat((e, -e))
    return 0.5 * (sigma * net.score(torch.cat((rows, rows)) + sigma * e) + e).square().sum(dim=1).mean()


def _sliced(net: Network, rows: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """``E[v'J v + (v's)^2 / 2]`` over random signs ``v``."""
    v = 2.0 * torch.randint(2, rows.shape, generator=generator, device=rows.device).float() - 1.0
    rows = rows.requires_grad_()
    along = (net.score(rows) * v).sum(dim=1)
    bend = (torch.autograd.grad(along.sum(), rows, create_graph=True)[0] * v).sum(dim=1)
    return (bend + 0.5 * along.square()).mean()


def _exact(net: Network, rows: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """``E[tr J + |s|^2 / 2]``."""
    rows = rows.requires_grad_()
    score = net.score(rows)
    bends = [torch.autograd.grad(score[:, k].sum(), rows, create_graph=True)[0][:, k] for k in range(score.shape[1])]
    return (torch.stack(bends).sum(dim=0) + 0.5 * score.square().sum(dim=1)).mean()


_LOSSES: dict[str, Callable[[Network, Tensor, float, torch.Generator], Tensor]] = {
    "denoising": _denoising,
    "sliced": _sliced,
    "exact": _exact,
}


def _checked(data: ArrayLike) -> Array:
    x = np.asarray(data, dtype=np.float64)
    if x.ndim not in (1, 2) or len(x) < 2 or x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"data must be at least two finite observations (n,) or (n, d), got shape {x.shape}")
    x = x.reshape(len(x), -1)
    constant = np.flatnonzero(~(x.std(axis=0) > 1e-12 * np.abs(x).max(axis=0)))
    if constant.size:
        raise ValueError(f"data must vary in every coordinate, got a constant in {constant.tolist()}")
    return x
