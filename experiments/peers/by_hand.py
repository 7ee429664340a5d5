"""The perceptron job without any framework of federated learning: a round's clients stacked in one program, the backward pass written out."""

import time

import numpy as np
import torch

from experiments.peers.job import Job, Vector


def run_torch(job: Job, rounds: int) -> tuple[list[float], Vector]:
    """Batched products of torch into buffers made once; the logits stand by class, so that the narrow products have long rows."""
    data = job.task.data().train
    inputs, targets = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    server = [p.detach().clone() for p in job.task.build(job.seed).parameters()]
    n, steps, batch, (hidden, features), classes = job.cohort, job.steps, job.batch, server[0].shape, len(server[3])
    w1, b1, w2, b2 = weights = [p.new_empty(n, *p.shape) for p in server]
    x, h, e = torch.empty(n * steps * batch, features), torch.empty(n, batch, hidden), torch.empty(n, batch, hidden)
    d, hot = torch.empty(n, classes, batch), torch.empty(n, steps, classes, batch)
    rate, seconds = job.rate / batch, []
    with torch.no_grad():
        for r in range(rounds):
            start = time.perf_counter()
            taken = torch.from_numpy(job.order(r, job.cohort_of(r)).reshape(-1))
            torch.index_select(inputs, 0, taken, out=x)
            hot.zero_().scatter_(2, targets[taken].view(n, steps, 1, batch), 1.0)
            for weight, p in zip(weights, server, strict=True):
                weight.copy_(p)
            for t in range(steps):
                xt = x.view(n, steps, batch, features)[:, t]
                torch.baddbmm(b1[:, None], xt, w1.transpose(1, 2), out=h).relu_()
                torch.baddbmm(b2[:, :, None], w2, h.transpose(1, 2), out=d)
                d = d.softmax(1).sub_(hot[:, t])
                torch.bmm(d.transpose(1, 2), w2, out=e)
                torch.ops.aten.threshold_backward.grad_input(e, h, 0.0, grad_input=e)
                w2.baddbmm_(d, h, alpha=-rate)
                b2.sub_(d.sum(2), alpha=rate)
                w1.baddbmm_(e.transpose(1, 2), xt, alpha=-rate)
                b1.sub_(e.sum(1), alpha=rate)
            server = [weight.mean(0) for weight in weights]
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
