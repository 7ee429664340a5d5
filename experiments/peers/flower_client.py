"""The job's client as a Flower ``ClientApp``, in a module of its own: what a worker imports, it can cache."""

import os
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from experiments.peers.job import Job, named

app = ClientApp()


@cache
def job() -> Job:
    """The job named by the environment of the simulation, with its data loaded once a process."""
    torch.set_num_threads(1)
    return named(os.environ["FEDSIM_PEER_JOB"])


@cache
def model() -> nn.Module:
    """One module a process."""
    return job().task.build(job().seed).train()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Local SGD on the job's batches of this round."""
    client, round = (int(message.content["config"][name]) for name in ("client", "round"))
    data, module = job().task.data().train, model()
    parameters = list(module.parameters())
    with torch.no_grad():
        for p, value in zip(parameters, message.content["model"].to_numpy_ndarrays(), strict=True):
            p.copy_(torch.from_numpy(value))
    optimiser = torch.optim.SGD(parameters, lr=job().rate)
    for rows in job().order(round, np.array([client]))[0]:
        inputs, targets = data.batch(rows)
        optimiser.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        optimiser.step()
    arrays = ArrayRecord([p.detach().numpy() for p in parameters])
    return Message(RecordDict({"model": arrays}), reply_to=message)
