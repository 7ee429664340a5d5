"""The job on Flower's simulation engine (Ray backend): ``python -m experiments.peers.flower JOB ROUNDS OUT``.

Written against the message interface with nothing but what the job needs: no evaluation, one message a client and round, which says which
client the node is to be, because nodes come in an order of their own: so cohorts and batches are those of every other engine.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def main(name: str, rounds: int, out: str) -> None:
    """Run and write seconds of each round, seconds in all since the process began, and the test loss."""
    began = time.perf_counter()
    os.environ.update(FEDSIM_PEER_JOB=name, FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from experiments.peers import flower_client
    from experiments.peers.job import named

    torch.set_num_threads(1)
    job = named(name)
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def serve(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < job.clients:
            time.sleep(0.05)
        module = job.task.build(job.seed)
        values = [p.detach().numpy() for p in module.parameters()]
        seconds = []
        for r in range(rounds):
            start = time.perf_counter()
            model = ArrayRecord(values)
            told = {c: RecordDict({"model": model, "config": ConfigRecord({"round": r, "client": c})}) for c in job.cohort_of(r).tolist()}
            replies = grid.send_and_receive([Message(content, nodes[c], "train") for c, content in told.items()])
            arrived = [reply.content["model"].to_numpy_ndarrays() for reply in replies]
            values = [np.mean(parts, axis=0) for parts in zip(*arrived, strict=True)]
            seconds.append(time.perf_counter() - start)
        loss = job.test_loss(np.concatenate([v.reshape(-1) for v in values]))
        found = {"seconds": seconds, "loss": loss, "whole": time.perf_counter() - began, "replies": len(arrived)}
        Path(out).write_text(json.dumps(found))

    backend = {"client_resources": {"num_cpus": 1}, "init_args": {"include_dashboard": False, "log_to_driver": False, "num_cpus": 2}}
    run_simulation(server, flower_client.app, job.clients, backend_config=backend)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
