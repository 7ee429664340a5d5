"""The perceptron job on pfl-research, run by an environment of its own that has pfl and torch: ``python pfl_script.py FILE OUT``.

``FILE`` (npz) holds the data, the initial parameters, the cohorts and every client's examples in the order of its batches. One process, no evaluation.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel


class Perceptron(torch.nn.Sequential):
    """The job's model with the two methods pfl asks for."""

    def loss(self, x, y, eval=False):
        return F.cross_entropy(self(x), y)

    def metrics(self, x, y, eval=False):
        return {}


class Clock(TrainingProcessCallback):
    """When each central iteration ended."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.times.append(time.perf_counter())
        return False, Metrics()


def main(path, out):
    began = time.perf_counter()
    torch.set_num_threads(1)
    job = np.load(path)
    inputs, targets = torch.from_numpy(job["inputs"]), torch.from_numpy(job["targets"])
    cohorts, orders, batch, rate = job["cohorts"], job["orders"], int(job["batch"]), float(job["rate"])
    rounds, cohort = cohorts.shape
    module = Perceptron(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    with torch.no_grad():
        for p, part in zip(module.parameters(), np.split(job["params"], job["cuts"]), strict=True):
            p.copy_(torch.from_numpy(part).view_as(p))
    drawn = iter(range(rounds * cohort))  # a user is a place in the sequence of all draws, so that each comes with the batches of its round

    def user(place):
        rows = torch.from_numpy(orders[place // cohort, place % cohort])
        return Dataset([inputs[rows], targets[rows]])

    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), 1.0))
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(central_num_iterations=rounds, evaluation_frequency=10**6, train_cohort_size=cohort, val_cohort_size=0),
        SimulatedBackend(FederatedDataset(user, lambda: next(drawn)), None),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=rate, local_batch_size=batch),
        NNEvalHyperParams(local_batch_size=None),
        [clock],
    )
    with torch.no_grad():
        loss = float(F.cross_entropy(module(torch.from_numpy(job["test_inputs"])), torch.from_numpy(job["test_targets"])))
    with open(out, "w") as file:
        json.dump({"seconds": np.diff(clock.times).tolist(), "loss": loss, "whole": time.perf_counter() - began}, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
