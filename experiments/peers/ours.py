"""The job on fedsim."""

import time

from experiments.peers.job import Job, Vector
from fedsim.runtime.executor import Executor


def run(job: Job, rounds: int, executor: Executor, lanes: int | None = None) -> tuple[list[float], Vector]:
    """Seconds of each round, and the final parameters."""
    training = job.training(executor, lanes)
    state, seconds = training.init(), []
    for _ in range(rounds):
        start = time.perf_counter()
        state, _ = training.step(state)
        seconds.append(time.perf_counter() - start)
    return seconds, state.params
