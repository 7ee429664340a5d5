"""The whole job on one engine as a process, imports included: ``python -m experiments.peers.whole ENGINE JOB ROUNDS OUT``."""

import json
import sys
from pathlib import Path

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
        from fedsim.runtime import RayExecutor, SerialExecutor

        with RayExecutor(workers=2) if engine == "fedsim-ray" else SerialExecutor() as executor:
            seconds, params = ours.run(job, rounds, executor)
    Path(out).write_text(json.dumps({"seconds": seconds, "loss": job.test_loss(params)}))


if __name__ == "__main__":
    if sys.argv[1] not in ENGINES:
        raise SystemExit(f"the engine must be one of {', '.join(ENGINES)}, got {sys.argv[1]!r}")
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
