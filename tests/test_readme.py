"""The README's code, run word for word."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def run_python(arguments: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_runs_and_so_does_what_follows_it(tmp_path):
    """The comparison after it at one seed instead of five; the fork as printed."""
    following = BLOCKS[1].replace("range(5)", "range(1)")
    assert following != BLOCKS[1]
    (tmp_path / "quickstart.py").write_text(BLOCKS[0] + following)
    printed = run_python(["quickstart.py"], tmp_path)
    assert "200 clients, 500 ticks" in printed
    assert "oracle" in printed
    assert list((tmp_path / "runs").glob("digits-*/report.html"))


def test_the_detector_example_runs(tmp_path):
    (tmp_path / "detect.py").write_text(BLOCKS[2])
    assert "Promise(arl=1000" in run_python(["detect.py"], tmp_path)


@pytest.mark.slow
def test_the_task_example_is_short_and_runs_from_the_command_line(tmp_path):
    definition = BLOCKS[3][BLOCKS[3].index("@dataclass") : BLOCKS[3].index("def simulation")]
    assert len(definition.strip().splitlines()) < 40
    (tmp_path / "blobs.py").write_text(BLOCKS[3])
    printed = run_python(["-m", "fedsim", "run", "blobs.py", "--workers", "0"], tmp_path)
    assert "20 clients, 120 ticks" in printed
    assert "complete" in run_python(["-m", "fedsim", "list", "runs"], tmp_path)


@pytest.mark.slow
def test_the_language_example_runs(tmp_path):
    (tmp_path / "language.py").write_text(next(block for block in BLOCKS if "save_pruned" in block))
    pruned, served = run_python(["language.py"], tmp_path).strip().splitlines()
    sparsity, parameters = pruned.split()
    assert 0.1 < float(sparsity) < 0.4
    assert int(parameters) < 450_000 / 4
    assert re.match(r"FlopCount\(dense=\d+, pruned=\d+, probe=\d+\) \d+ \(0\.\d+, 0\.\d+\)$", served)


def test_every_file_the_table_names_exists():
    for path in re.findall(r"`((?:fedsim|detection)/[\w/]+(?:\.py|/))`", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path
