"""Federated averaging as a loop over clients in plain PyTorch: one module reused, ``optim.SGD``, data indexed in memory."""

import copy
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from experiments.peers.job import Job, Vector


def run(job: Job, rounds: int, *, channels_last: bool = False) -> tuple[list[float], Vector]:
    """Seconds of each round, and the final parameters."""
    data = job.task.data().train
    inputs, targets = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    model = job.task.build(job.seed).train()
    if channels_last:
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    server = [p.detach().clone() for p in parameters]
    seconds = []
    for r in range(rounds):
        start = time.perf_counter()
        clients = job.cohort_of(r)
        order = torch.from_numpy(job.order(r, clients))
        total = [torch.zeros_like(p) for p in server]
        for rows in order:
            _train(model, parameters, server, inputs, targets, rows, job.rate)
            for t, p in zip(total, parameters, strict=True):
                t.add_(p.detach(), alpha=1 / len(clients))
        server = total
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cat([p.reshape(-1) for p in server]).numpy().astype(np.float32)


def run_with_loaders(job: Job, rounds: int) -> tuple[list[float], Vector]:
    """The same as it is most often written: a copy of the model and a ``DataLoader`` for every client."""
    data = job.task.data().train
    examples = TensorDataset(torch.from_numpy(data.inputs), torch.from_numpy(data.targets))
    server, seconds = job.task.build(job.seed).train(), []
    for r in range(rounds):
        start = time.perf_counter()
        clients = job.cohort_of(r)
        total: dict[str, torch.Tensor] = {}
        for rows in job.order(r, clients):
            model = copy.deepcopy(server)
            optimiser = torch.optim.SGD(model.parameters(), lr=job.rate)
            for inputs, targets in DataLoader(Subset(examples, rows.reshape(-1).tolist()), batch_size=job.batch):
                optimiser.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimiser.step()
            for name, value in model.state_dict().items():
                total[name] = total.get(name, 0) + value / len(clients)
        server.load_state_dict(total)
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cat([p.detach().reshape(-1) for p in server.parameters()]).numpy().astype(np.float32)


def _train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    server: Sequence[torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    rate: float,
) -> None:
    with torch.no_grad():
        for p, s in zip(parameters, server, strict=True):
            p.copy_(s)
    optimiser = torch.optim.SGD(parameters, lr=rate)
    for batch in rows:
        optimiser.zero_grad()
        F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimiser.step()
