"""The whole job on one engine as a process, imports included: ``python -m experiments.peers.whole ENGINE JOB ROUNDS OUT``."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsim.runtime.executor import Executor

ENGINES = ("loop", "by-hand", "fedsim", "fedsim-ray")


def main(engine: str, name: str, rounds: int, out: str) -> None:
    """Run and write seconds of each round and the test loss."""
    import torch

    from experiments.peers.job import named

    torch.set_num_threads(1)
    job = named(name)
    if engine == "loop":
        from experiments.peers import loop

        seconds, params = loop.run(job, rounds)
    elif engine == "by-hand":
        from experiments.peers import by_hand

        seconds, params = by_hand.run_torch(job, rounds)
    else:
        from experiments.peers import ours

        with _executor(engine) as executor:
            seconds, params = ours.run(job, rounds, executor)
    Path(out).write_text(json.dumps({"seconds": seconds, "loss": job.test_loss(params)}))


def _executor(engine: str) -> "Executor":
    if engine == "fedsim-ray":
        from fedsim.runtime import RayExecutor

        return RayExecutor(workers=2)
    from fedsim.runtime import SerialExecutor

    return SerialExecutor()


if __name__ == "__main__":
    if sys.argv[1] not in ENGINES:
        raise SystemExit(f"the engine must be one of {', '.join(ENGINES)}, got {sys.argv[1]!r}")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
