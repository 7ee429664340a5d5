"""The command line: quick help, recipes, one red line for errors, and the way back after Ctrl-C."""

import json
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import fedsim
from fedsim.errors import CapacityError, FedsimError
from fedsim.runs.run import Run
from fedsim.runs.store import RunStore, run_directory

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer before 0.21, which flwr asks for, imports names that click 8.5 deprecates
    from typer.testing import CliRunner

    from fedsim.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = ("run", "resume", "show", "report", "fork", "compare", "demo", "doctor", "tune", "explain", "verify", "replay", "list")
RECIPE = """
from fedsim.simulation import Simulation

def simulation():
    return Simulation(name="tiny", seed=1)

def other():
    return Simulation(name="other", seed=2)

def wrong():
    return 3
"""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    name: str = ""
    seed: int = 0


class Engine:
    """Stands in for the engine: notes what it is asked for, stores an empty run, or fails as told."""

    def __init__(self):
        self.calls, self.error = [], None
        self.refused, self.ok = "", True

    def simulate(self, simulation, out="runs", *, executor=None, progress=True, recipe=None):
        self.calls.append((simulation, out, executor, recipe))
        with RunStore.create(out, simulation, recipe=recipe) as store:
            if self.error:
                raise self.error
            store.mark_complete()
        return Run(store.path, simulation=simulation)

    def resume(self, path, *, executor=None, progress=True, trusted=()):
        stored = Run(path, trusted=trusted)
        self.calls.append((stored.simulation, path, executor, stored.recipe))
        return stored

    def compare(self, simulation, *, policies, seeds, out, executor, recipe):
        self.calls.append((simulation, policies, seeds, out, recipe))
        if isinstance(self.error, KeyboardInterrupt):
            raise self.error

        def report(_):
            if self.error:
                raise self.error
            return Path(out) / "comparison.html"

        return type("Comparison", (), {"table": lambda _: "the table", "report": report})()

    def fork(self, run, *, at, policy, out, executor):
        self.calls.append((run, at, policy, out))
        if self.error:
            raise self.error
        return run

    def fork_directory(self, run, *, at, policy, out):
        return run.path.parent / "forked"

    def demo(self, out, *, executor):
        self.calls.append((out, executor))
        if self.error:
            raise self.error

    def tune(self, simulation, *, seconds):
        return self.told(simulation, seconds)

    def explain(self, simulation, *, workers, seconds):
        return self.told(simulation, workers, seconds)

    def verify(self, run, blocks, seed, *, reach, executor):
        return self.told(run.path, blocks, seed, reach, type(executor).__name__)

    def replay(self, run, *, round, client, breakpoint):
        return self.told(run.path, round, client, breakpoint)

    def told(self, *arguments):
        """Notes what it was asked, and answers with a table of ``refused`` and ``ok``."""
        self.calls.append(arguments)
        if self.error:
            raise self.error
        return type("Answer", (), {"table": lambda _: "the table", "refused": self.refused, "ok": self.ok})()


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """The command line with a light engine, in an empty directory that holds a recipe."""
    made = Engine()
    for name, contents in {
        "simulation": {"Simulation": Simulation, "simulate": made.simulate, "resume": made.resume},
        "comparison": {"compare": made.compare},
        "branching": {"fork": made.fork, "fork_directory": made.fork_directory},
        "demo": {"demo": made.demo},
        "tuning": {"tune": made.tune},
        "explanation": {"explain": made.explain},
        "verification": {"verify": made.verify},
        "replaying": {"replay": made.replay},
    }.items():
        module = ModuleType(f"fedsim.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"fedsim.{name}", module)
        monkeypatch.setattr(fedsim, name, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "little.py").write_text(RECIPE)
    yield made
    sys.modules.pop("little", None)


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_help_is_quick_and_loads_neither_torch_nor_numpy():
    code = "import sys; sys.argv = ['fedsim', '--help']\nimport atexit; atexit.register(lambda: print([m for m in ('torch', 'numpy', 'ray', 'rich', 'pyarrow') if m in sys.modules]))\nfrom fedsim.cli import main; main()"
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        durations.append(time.perf_counter() - start)
    assert shown.splitlines()[-1] == "[]"
    assert min(durations) < 0.5, "0.3 s on a quiet machine"
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 4


def test_python_m_fedsim_is_the_same_command():
    shown = subprocess.run([sys.executable, "-m", "fedsim", "list", "nowhere"], capture_output=True, text=True, cwd=ROOT)
    assert (shown.returncode, shown.stdout, shown.stderr.strip()) == (1, "", "Error: no directory nowhere")


def test_a_recipe_is_run_and_remembered(engine):
    result = call("run", "little.py", "--workers", 0)
    assert result.exit_code == 0, result.stderr
    simulation, out, executor, recipe = engine.calls[0]
    assert (simulation, out) == (Simulation(name="tiny", seed=1), "runs")
    assert type(executor).__name__ == "SerialExecutor"
    assert recipe == f"{Path('little.py').resolve()}:simulation"
    assert "tiny-" in result.stdout


def test_seed_and_name_replace_those_of_the_recipe(engine):
    call("run", "little.py:other", "--seed", 7, "--name", "mine", "--out", "elsewhere")
    assert engine.calls[0][:3] == (Simulation(name="mine", seed=7), "elsewhere", None)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("absent.py", "no recipe at"),
        ("little.py:nothing", "has no function 'nothing'"),
        ("little.py:wrong", "must return a Simulation, got int"),
        ("no.such.module:f", "no module 'no.such.module'"),
        (":f", "a recipe is path.py"),
        ("json.py", "no recipe at"),
    ],
)
def test_a_bad_recipe_is_one_red_line(engine, recipe, message):
    result = call("run", recipe)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not engine.calls


def test_a_recipe_with_the_name_of_an_imported_module_is_refused(engine, tmp_path):
    (tmp_path / "json.py").write_text(RECIPE)
    assert "rename the recipe" in call("run", "json.py").stderr


def test_a_recipe_that_fails_to_import_is_not_left_half_imported(engine, tmp_path):
    (tmp_path / "broken_recipe.py").write_text("raise ValueError('half')")
    assert call("run", "broken_recipe.py").stderr == "Error: half\n"
    assert "broken_recipe" not in sys.modules


def test_an_error_of_the_engine_is_one_line_or_a_traceback_on_request(engine):
    engine.error = CapacityError("no level fits device 'watch';\n  lower the levels")
    result = call("run", "little.py")
    assert (result.exit_code, result.stderr) == (1, "Error: no level fits device 'watch'; lower the levels\n")
    with pytest.raises(CapacityError):
        CliRunner().invoke(main, ["--traceback", "run", "little.py"], catch_exceptions=False)


def test_a_bug_is_not_dressed_up_as_a_user_error(engine):
    engine.error = KeyError("bug")
    with pytest.raises(KeyError):
        CliRunner().invoke(main, ["run", "little.py"], catch_exceptions=False)


def test_interrupting_tells_how_to_go_on(engine):
    engine.error = KeyboardInterrupt()
    result = call("run", "little.py")
    path = run_directory("runs", Simulation(name="tiny", seed=1))
    assert result.exit_code == 130
    assert f"fedsim resume {path}" in result.stderr
    engine.error = None
    again = CliRunner()
    resumed = again.invoke(main, ["resume", str(path)], catch_exceptions=False)
    assert resumed.exit_code == 1, "the stand-in lives outside the recipe's folder, so its class is not trusted"
    assert "not from a trusted package" in resumed.stderr


def test_a_run_is_resumed_where_it_lies_with_the_classes_of_its_recipe(engine, tmp_path):
    text = RECIPE.replace("\ndef simulation", "\nfrom shapes import Shaped\n\ndef simulation").replace(
        'Simulation(name="tiny"', 'Shaped(name="tiny"'
    )
    (tmp_path / "shaped.py").write_text(text)
    (tmp_path / "shapes.py").write_text(
        "from dataclasses import dataclass\nfrom fedsim.simulation import Simulation\n\n@dataclass(frozen=True, kw_only=True)\nclass Shaped(Simulation):\n    pass\n"
    )
    try:
        assert call("run", "shaped.py").exit_code == 0
        (path,) = (tmp_path / "runs").iterdir()
        for name in ("shaped", "shapes"):
            del sys.modules[name]
        renamed = path.rename(path.with_name("kept"))
        result = call("resume", "kep")
        assert result.exit_code == 0, result.stderr
        assert [c[0].seed for c in engine.calls] == [1, 1]
        assert engine.calls[1][3] == engine.calls[0][3]
        assert engine.calls[1][1].resolve() == renamed
    finally:
        for name in ("shaped", "shapes"):
            sys.modules.pop(name, None)


def test_runs_are_listed_shown_and_reported(engine, tmp_path):
    assert "no runs in" in call("list", tmp_path).stdout
    for recipe in ("little.py", "little.py:other"):
        call("run", recipe)
    lines = call("list").stdout.splitlines()
    assert [line.split()[0].partition("-")[0] for line in lines] == ["run", "other", "tiny"]
    assert "complete" in lines[1]
    assert call("show", "tiny").stdout.startswith("tiny-")
    page = Path(call("report", "tiny").stdout.strip())
    assert page.name == "report.html"
    assert page.is_file()


def test_a_name_that_is_no_run_or_several_is_refused(engine):
    for seed in (1, 2):
        call("run", "little.py", "--seed", seed)
    assert call("show", "nothing").stderr == "Error: no run directory nothing\n"
    assert "is the start of several runs: tiny-" in call("show", "tiny").stderr


def test_policies_are_written_as_words(engine):
    from fedsim.policies import Never, Oracle, Periodic, RepruneOnAlarm

    result = call("compare", "little.py", "--policies", "never, periodic:40,alarm:latency=7+window=32,oracle", "--seeds", 3)
    assert result.exit_code == 0, result.stderr
    simulation, policies, seeds, out, recipe = engine.calls[0]
    assert simulation == Simulation(name="tiny", seed=1)
    assert policies == {
        "never": Never(),
        "periodic:40": Periodic(every=40),
        "alarm:latency=7+window=32": RepruneOnAlarm(latency=7, window=32),
        "oracle": Oracle(),
    }
    assert (seeds, out, recipe) == (range(3), Path("runs"), f"{Path('little.py').resolve()}:simulation")
    assert result.stdout == "the table\n\nruns/comparison.html\n"


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ("never,never", "different names"),
        (",", "different names"),
        ("sometimes", "policy must be one of"),
        ("periodic", "periodic:40"),
        ("periodic:0", "every must be"),
        ("never:3", "FIELD=VALUE"),
        ("alarm:delay=3", "FIELD=VALUE"),
    ],
)
def test_a_policy_that_is_none_is_refused(engine, policies, message):
    result = call("compare", "little.py", "--policies", policies)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not engine.calls


def test_a_policy_may_come_from_a_recipe(engine, tmp_path):
    from fedsim.policies import Periodic

    (tmp_path / "chosen.py").write_text("from fedsim.policies import Periodic\n\ndef policy():\n    return Periodic(every=9)\n")
    try:
        assert call("compare", "little.py", "--policies", "chosen.py").exit_code == 0
        assert engine.calls[0][1] == {"chosen.py": Periodic(every=9)}
        assert "must return a policy" in call("compare", "little.py", "--policies", "little.py:wrong").stderr
    finally:
        sys.modules.pop("chosen", None)


def test_a_run_is_forked_under_another_policy(engine):
    from fedsim.policies import Never

    with RunStore.create("runs", Simulation(name="tiny")) as store:
        pass
    result = call("fork", store.path, "--at", 30, "--policy", "never")
    assert result.exit_code == 0, result.stderr
    run, at, policy, out = engine.calls[0]
    assert (run.path, at, policy, out) == (store.path, 30, Never(), None)


def test_the_demo_runs_where_it_is_told(engine):
    assert call("demo", "--out", "there").exit_code == 0
    assert engine.calls == [("there", None)]


def test_the_table_of_a_comparison_is_told_before_its_page_fails(engine):
    engine.error = FedsimError("a report needs matplotlib")
    result = call("compare", "little.py", "--policies", "never")
    assert result.exit_code == 1
    assert result.stdout.strip() == "the table"
    assert "matplotlib" in result.stderr


@pytest.mark.parametrize("arguments", [("compare", "little.py"), ("demo",)])
def test_interrupting_many_runs_tells_to_repeat_the_command(engine, arguments):
    engine.error = KeyboardInterrupt()
    result = call(*arguments)
    assert result.exit_code == 130
    assert result.stderr == "\nInterrupted. The same command goes on from there.\n"


def test_interrupting_a_fork_tells_where_it_is_once_it_is_there(engine):
    with RunStore.create("runs", Simulation(name="tiny")) as store:
        pass
    engine.error = KeyboardInterrupt()
    arguments = ("fork", store.path, "--at", 30, "--policy", "never")
    assert "The same command goes on" in call(*arguments).stderr
    forked = store.path.parent / "forked"
    forked.mkdir()
    (forked / "config.json").write_text("{}")
    assert f"Continue with: fedsim resume {forked}" in call(*arguments).stderr


def test_a_recipe_is_tuned_and_explained(engine):
    simulation = Simulation(name="tiny", seed=1)
    for arguments in (("tune", "little.py", "--seconds", 5), ("explain", "little.py", "--workers", 0), ("explain", "little.py")):
        result = call(*arguments)
        assert (result.exit_code, result.stdout) == (0, "the table\n"), result.stderr
    assert engine.calls == [(simulation, 5.0), (simulation, 1, 30.0), (simulation, None, 30.0)]


def test_a_plan_that_is_refused_is_one_red_line(engine):
    engine.refused = "client 3 holds no level"
    result = call("explain", "little.py")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: client 3 holds no level\n")


@pytest.fixture
def stored_path(engine):
    with RunStore.create("runs", Simulation(name="tiny")) as store:
        return store.path


def test_a_run_is_verified_and_what_differs_is_an_exit_code(engine, stored_path):
    assert call("verify", stored_path).stdout == "the table\n"
    assert call("verify", stored_path, "--blocks", 9, "--seed", 4, "--reach", 0).exit_code == 0
    assert engine.calls == [(stored_path, 3, 0, 10, "SerialExecutor"), (stored_path, 9, 4, None, "SerialExecutor")]
    engine.ok = False
    result = call("verify", stored_path)
    assert (result.exit_code, result.stdout) == (1, "the table\n")


def test_a_client_is_replayed(engine, stored_path):
    assert call("replay", stored_path, "--round", 31, "--client", 17).stdout == "the table\n"
    call("replay", stored_path, "--round", 31, "--client", 17, "--breakpoint")
    assert engine.calls == [(stored_path, 31, 17, False), (stored_path, 31, 17, True)]
    engine.error = ValueError("client 17 took no part in round 31")
    assert call("replay", stored_path, "--round", 31, "--client", 17).stderr == "Error: client 17 took no part in round 31\n"
    assert call("replay", stored_path).exit_code == 2


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("failed", 1)])
def test_the_doctors_exit_code_says_whether_something_is_missing(engine, monkeypatch, state, code):
    from fedsim import doctor

    asked = []

    def examine(out, *, address):
        asked.append((out, address))
        yield doctor.Finding("ray", "ok", "there")
        yield doctor.Finding("disk", state, "full", "free some" if code else "")

    monkeypatch.setattr(doctor, "examine", examine)
    result = call("doctor", "--out", "there", "--address", "auto")
    assert result.exit_code == code
    assert result.stdout.splitlines()[0].split() == ["ok", "ray", "there"]
    assert ("-> free some" in result.stdout) == bool(code)
    told = call("doctor", "--json")
    assert told.exit_code == code
    assert [(f["name"], f["state"]) for f in json.loads(told.stdout)] == [("ray", "ok"), ("disk", state)]
    assert asked == [(Path("there"), "auto"), (Path("runs"), None)]


@pytest.mark.slow
def test_a_run_is_explained_made_verified_and_replayed_from_the_shell(tmp_path):
    """The commands as they are, one process each."""
    text = Path(__file__).with_name("tiny.py").read_text().replace("serving=fs.Serving(ticks=100", "serving=fs.Serving(ticks=50")
    (tmp_path / "recipe.py").write_text(text.replace("start=fs.At(40)", "start=fs.At(30)"))

    def shell(*arguments):
        done = subprocess.run([sys.executable, "-m", "fedsim", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "training, 8 rounds (exact)" in shell("explain", "recipe.py", "--workers", 0)
    assert "clients/s" in shell("tune", "recipe.py", "--seconds", 1)
    assert "stored in" in shell("run", "recipe.py", "--workers", 0)
    assert "all equal" in shell("verify", "tiny")
    client = next(iter(Run(next((tmp_path / "runs").glob("tiny-*"))).clients()["client"].to_pylist()))
    assert "mean loss" in shell("replay", "tiny", "--round", 0, "--client", client)
