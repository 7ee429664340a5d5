"""What the clients of a block send when they are due, and what they keep: the strategy's upload, compressed if it says so."""

# n clients, P parameters, M scalars of an upload, S scalars a client keeps for the strategy, S' for the compression

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.communication.compression import Senders
from fedsim.parameters import Layout
from fedsim.strategies import ServerState, Strategy, Trained
from fedsim.updates import Vector


@dataclass(frozen=True)
class Sizes:
    """Scalars of a model (P), of an upload (M), and of what a client keeps: for the strategy (S) and for its compression (S')."""

    model: int
    upload: int
    strategy: int
    compression: int

    @classmethod
    def of(cls, strategy: Strategy, layout: Layout, server: ServerState) -> "Sizes":
        """Measured on one client that has not moved. Raises ``ValueError`` for a strategy whose ``finish`` keeps other than ``client_size`` says."""
        kept = strategy.client_size(layout.size)
        zeros = torch.zeros(layout.size, dtype=getattr(torch, layout.dtype))
        still = Trained(
            start=zeros, end=zeros[None], steps=torch.ones(1, dtype=torch.int64), client=zeros.new_zeros(1, kept), server=server
        )
        upload, client = strategy.finish(still)
        found = 0 if client is None else client.shape[1]
        if found != kept:
            raise ValueError(f"{type(strategy).__name__}.finish keeps {found} scalars a client, its client_size says {kept}")
        compression = strategy.compression
        return cls(layout.size, upload.shape[1], kept, 0 if compression is None else compression.state_size(upload.shape[1]))

    @property
    def memory(self) -> int:
        """Scalars a client keeps in all."""
        return self.strategy + self.compression


@dataclass(frozen=True, eq=False)
class Sender:
    """A block's clients (n,) at one of their merges: all that their uploads depend on. ``draws`` (n,): the number, the round's, of their random draws; ``step``: local steps of the round done by then."""

    strategy: Strategy
    sizes: Sizes
    clients: NDArray[np.int64]
    seed: int
    draws: NDArray[np.int64]
    step: int

    def send(
        self, start: Tensor, end: Tensor, steps: NDArray[np.int64], memory: Vector | None, server: Any
    ) -> tuple[Tensor, Vector | None]:
        """What the server receives (n, M), and what each client keeps (n, S + S'); see :class:`fedsim.strategies.Trained`."""
        sizes = self.sizes
        if type(self.strategy).finish is Strategy.finish and self.strategy.compression is None and not sizes.memory:
            return end, None
        if not sizes.memory:
            kept = end.new_empty(len(end), 0)
        else:
            assert memory is not None
            kept = torch.tensor(memory, device=end.device)
        own, residual = kept[:, : sizes.strategy], kept[:, sizes.strategy :]
        upload, own_after = self.strategy.finish(Trained(start, end, torch.tensor(steps, device=end.device), own, server))
        upload, residual = self._compressed(upload, start, residual)
        if not sizes.memory:
            return upload, None
        return upload, torch.cat([own if own_after is None else own_after, residual], dim=1).cpu().numpy()

    def _compressed(self, upload: Tensor, start: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The upload as it arrives: what is compressed is its difference from the model handed out, in its first P places."""
        rule = self.strategy.compression
        if rule is None:
            return upload, residual
        base = torch.cat([start, start.new_zeros(self.sizes.upload - self.sizes.model)])
        received, residual = rule.compress(upload - base, residual, Senders(self.clients, self.seed, self.draws, self.step))
        return base + received, residual
