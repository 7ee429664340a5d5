"""The rules of the house: who may import whom, what an import costs, what the pure parts may not touch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ONLY_IMPORTERS = {
    "ray": ("fedsim/runtime/ray.py",),
    "flwr": ("fedsim/bridges/",),
    "transformers": ("fedsim/llm/",),
    "matplotlib": ("fedsim/runs/", "experiments/"),
    "detection": ("fedsim/monitoring.py",),
}
HEAVY = ("ray", "flwr", "transformers", "matplotlib", "pandas", "sklearn")
LEARNED = ("score_matching.py", "score_network.py")  # of detection, and never imported with it
PURE = ("fedsim/communication", "fedsim/pruning", "fedsim/strategies", "detection")


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path, *, eager_only: bool = False) -> set[str]:
    """Modules a file imports; with ``eager_only``, those imported when it is imported itself."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if not eager_only else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", ONLY_IMPORTERS)
def test_a_foreign_package_has_one_importer(package):
    for path in sources("fedsim"):
        name = path.relative_to(ROOT).as_posix()
        if package in {module.partition(".")[0] for module in imports(path)}:
            assert name.startswith(ONLY_IMPORTERS[package]), f"{name} imports {package}"


def test_arrows_run_one_way():
    for path in sources("detection"):
        barred = {"fedsim", "experiments"} | (set() if path.name in LEARNED else {"torch"})
        assert not {m.partition(".")[0] for m in imports(path)} & barred, path
    for path in sources("fedsim"):
        assert "experiments" not in {m.partition(".")[0] for m in imports(path)}, path
    for path in sources("fedsim/communication", "fedsim/pruning", "fedsim/strategies"):
        assert not any(m.startswith("fedsim.run") for m in imports(path)), f"{path} knows a runtime"


def test_pure_packages_neither_print_nor_log_nor_read_a_clock():
    for path in sources(*PURE):
        assert not imports(path) & {"logging", "time", "datetime"}, path
        calls = {n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert "print" not in calls, path


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_importing_every_public_name_loads_no_heavy_package():
    code = f"import sys, fedsim as fs; [getattr(fs, n) for n in fs.__all__ if n != 'RayExecutor']; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_import_fedsim_costs_at_most_torch_and_three_tenths_of_a_second():
    code = "import time, torch; start = time.process_time(); import fedsim; print(time.process_time() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_the_first_simulation_loads_the_engine_in_seven_tenths_of_the_time_of_torch():
    code = (
        "import time; start = time.process_time(); import torch; theirs = time.process_time() - start\n"
        "import fedsim as fs; start = time.process_time(); fs.Simulation; print((time.process_time() - start) / theirs)"
    )
    assert min(float(run_python(code)) for _ in range(3)) < 0.7  # a share: seconds differ by half from hour to hour


def test_help_answers_in_half_a_second_without_torch():
    code = """
import sys, time
start = time.process_time()
sys.argv = ["fedsim", "--help"]
from fedsim.cli import main
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules, time.process_time() - start)
"""
    answers = [run_python(code).splitlines()[-1].split() for _ in range(3)]
    assert {loaded for loaded, _ in answers} == {"False"}
    assert min(float(seconds) for _, seconds in answers) < 0.5
