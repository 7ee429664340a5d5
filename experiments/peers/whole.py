"""The whole job on fedsim as a process, imports included: ``python -m experiments.peers.whole JOB ROUNDS OUT``."""

import json
import sys
import time
from pathlib import Path


def main(name: str, rounds: int, out: str) -> None:
    """Run and write seconds of each round, seconds in all since the process began, and the test loss."""
    began = time.perf_counter()
    from experiments.peers import ours
    from experiments.peers.job import named
    from fedsim.runtime import SerialExecutor

    job = named(name)
    seconds, params = ours.run(job, rounds, SerialExecutor())
    loss = job.test_loss(params)
    Path(out).write_text(json.dumps({"seconds": seconds, "loss": loss, "whole": time.perf_counter() - began}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
