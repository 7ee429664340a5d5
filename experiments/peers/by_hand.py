"""The perceptron job without any framework of federated learning: a round's clients stacked in one program, the backward pass written out."""

import time

import numpy as np
import torch

from experiments.peers.job import Job, Vector


def run_torch(job: Job, rounds: int, width: int = 50) -> tuple[list[float], Vector]:
    """Batched products of torch, ``width`` clients at once."""
    data = job.task.data().train
    inputs, targets = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    server = [p.detach().clone() for p in job.task.build(job.seed).parameters()]
    seconds = []
    with torch.no_grad():
        for r in range(rounds):
            start = time.perf_counter()
            clients = job.cohort_of(r)
            order = torch.from_numpy(job.order(r, clients))
            total = [torch.zeros_like(p) for p in server]
            for low in range(0, len(clients), width):
                rows = order[low : low + width]
                n = len(rows)
                w1, b1, w2, b2 = (p.expand(n, *p.shape).contiguous() for p in server)
                for t in range(job.steps):
                    batch = rows[:, t].reshape(-1)
                    x, y = inputs[batch].view(n, job.batch, -1), targets[batch].view(n, job.batch, 1)
                    h = torch.baddbmm(b1[:, None], x, w1.transpose(1, 2)).relu_()
                    d = torch.baddbmm(b2[:, None], h, w2.transpose(1, 2)).softmax(-1)
                    d.scatter_add_(-1, y, d.new_full((1, 1, 1), -1.0).expand_as(y)).mul_(1 / job.batch)
                    e = torch.bmm(d, w2).mul_(h > 0)
                    w2.baddbmm_(d.transpose(1, 2), h, alpha=-job.rate)
                    b2.sub_(d.sum(1), alpha=job.rate)
                    w1.baddbmm_(e.transpose(1, 2), x, alpha=-job.rate)
                    b1.sub_(e.sum(1), alpha=job.rate)
                for t_, p in zip(total, (w1, b1, w2, b2), strict=True):
                    t_.add_(p.sum(0), alpha=1 / len(clients))
            server = total
            seconds.append(time.perf_counter() - start)
    return seconds, torch.cat([p.reshape(-1) for p in server]).numpy().astype(np.float32)


def run_numpy(job: Job, rounds: int, width: int = 50) -> tuple[list[float], Vector]:
    """The same in NumPy."""
    data = job.task.data().train
    server = [p.detach().numpy().copy() for p in job.task.build(job.seed).parameters()]
    rate, seconds = np.float32(job.rate), []
    one_hot = np.eye(10, dtype=np.float32)
    for r in range(rounds):
        start = time.perf_counter()
        clients = job.cohort_of(r)
        order = job.order(r, clients)
        total = [np.zeros_like(p) for p in server]
        for low in range(0, len(clients), width):
            rows = order[low : low + width]
            n = len(rows)
            w1, b1, w2, b2 = (np.repeat(p[None], n, 0) for p in server)
            for t in range(job.steps):
                x, y = data.inputs[rows[:, t]], one_hot[data.targets[rows[:, t]]]
                h = x @ w1.transpose(0, 2, 1)
                h += b1[:, None]
                np.maximum(h, 0, out=h)
                d = h @ w2.transpose(0, 2, 1)
                d += b2[:, None]
                d -= d.max(-1, keepdims=True)
                np.exp(d, out=d)
                d /= d.sum(-1, keepdims=True)
                d -= y
                d *= rate / job.batch
                e = d @ w2
                e *= h > 0
                w2 -= d.transpose(0, 2, 1) @ h
                b2 -= d.sum(1)
                w1 -= e.transpose(0, 2, 1) @ x
                b1 -= e.sum(1)
            for s, p in zip(total, (w1, b1, w2, b2), strict=True):
                s += p.sum(0) / len(clients)
        server = total
        seconds.append(time.perf_counter() - start)
    return seconds, np.concatenate([p.reshape(-1) for p in server])
