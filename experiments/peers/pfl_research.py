"""The perceptron job on pfl-research, whose requirements need an environment of their own."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments.peers.job import Job

REQUIREMENTS = ("torch==2.13.0", "pfl==0.6.0")
SCRIPT = Path(__file__).with_name("pfl_script.py")


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with pfl under ``folder``, made there unless it exists. ``RuntimeError`` says why it cannot be made."""
    python = folder / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", "import pfl"], capture_output=True).returncode == 0:
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    made = subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"pip install {' '.join(REQUIREMENTS)} failed: {made.stderr.strip().splitlines()[-1:]}")
    return python


def command(job: Job, rounds: int, python: Path, scratch: Path) -> list[str]:
    """The command of the job under pfl's ``python``; it wants one more argument, the file for its findings. What it reads lies in ``scratch``."""
    cohorts = np.stack([job.cohort_of(r) for r in range(rounds)])
    orders = np.stack([job.order(r, clients).reshape(len(clients), -1) for r, clients in enumerate(cohorts)])
    data, sizes = job.task.data(), [p.numel() for p in job.task.build(job.seed).parameters()]
    given = scratch / "pfl.npz"
    np.savez(
        given,
        inputs=data.train.inputs,
        targets=data.train.targets,
        test_inputs=data.test.inputs,
        test_targets=data.test.targets,
        params=job.initial(),
        cuts=np.cumsum(sizes)[:-1],
        cohorts=cohorts,
        orders=orders,
        batch=job.batch,
        rate=job.rate,
    )
    return [str(python), str(SCRIPT), str(given)]
