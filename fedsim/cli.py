"""The command line. Everything heavy is imported inside the command that needs it, so ``--help`` answers at once."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from fedsim.errors import FedsimError
from fedsim.runs.recipes import Recipe

if TYPE_CHECKING:
    import click

    from fedsim.policies import Policy
    from fedsim.runs.run import Run
    from fedsim.runtime.executor import Executor

Out = Annotated[Path, typer.Option(help="Directory that holds the run directories.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Ray actors; 0 runs in this process. Default: Ray on all cores. The numbers are the same.")
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Seed of training, streams and policies, in place of the recipe's; its fleet and task keep their own."),
]
RecipeText = Annotated[str, typer.Argument(metavar="RECIPE")]
RunText = Annotated[str, typer.Argument(metavar="RUN")]

typer.core.HAS_RICH = (
    False  # plain help: importing rich costs half the time --help may take, and brackets are escaped for it even when unused
)


class _Commands(typer.core.TyperGroup):
    """Turns errors a user can act on into one red line, and Ctrl-C into the command that goes on from there."""

    def invoke(self, ctx: "click.Context") -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.secho(f"\nInterrupted.{_way_on(ctx.obj or {})}", err=True)
            raise typer.Exit(130) from None
        except (FedsimError, ValueError, OSError) as error:
            if ctx.params.get("traceback"):
                raise
            typer.secho(f"Error: {' '.join(str(error).split())}", fg="red", err=True)
            raise typer.Exit(1) from None


def _way_on(told: dict[str, Any]) -> str:
    path = told.get("path")
    if path and (path / "config.json").exists():
        return f" Continue with: fedsim resume {path}"
    return " The same command goes on from there." if told else ""


main = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@main.callback()
def _fedsim(ctx: typer.Context, traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose.")] = False) -> None:
    """Simulate fleets of unequal clients that train, serve and drift.

    RECIPE is path.py[:function] or module:function; RUN is a run directory, or the start of the name of one in runs/.
    """
    ctx.obj = {}


@main.command()
def run(
    ctx: typer.Context,
    recipe: RecipeText,
    out: Out = Path("runs"),
    workers: Workers = None,
    seed: Seed = None,
    name: Annotated[str | None, typer.Option(help="Name of the run directory, in place of the recipe's.")] = None,
) -> None:
    """Run a recipe, or go on with it where it stopped.

    RECIPE is path.py[:function] or module:function; the function (by default "simulation") returns a Simulation.
    """
    simulation = _simulation(recipe, seed=seed, name=name)
    from fedsim.runs.store import run_directory
    from fedsim.simulation import simulate

    ctx.obj["path"] = run_directory(out, simulation)
    with _executor(workers) as executor:
        _tell(simulate(simulation, str(out), executor=executor, recipe=str(Recipe.parse(recipe))))


@main.command()
def resume(ctx: typer.Context, run: RunText, workers: Workers = None) -> None:
    """Go on with an interrupted run; its tables end as if it had never stopped."""
    path = _run_path(run)
    ctx.obj["path"] = path
    trusted = _trusted(path)
    from fedsim.simulation import resume

    with _executor(workers) as executor:
        _tell(resume(path, executor=executor, trusted=trusted))


@main.command()
def show(run: RunText) -> None:
    """Print the tables of a run."""
    typer.echo(_stored(run, recipe=False).summary())


@main.command()
def report(run: RunText) -> None:
    """Draw the figures of a run and write its page."""
    typer.echo(_stored(run, recipe=False).report())


@main.command()
def fork(
    ctx: typer.Context,
    run: RunText,
    at: Annotated[int, typer.Option(min=0, help="Tick at which the other policy takes over.")],
    policy: Annotated[str, typer.Option(help="never, periodic:40, alarm, oracle, or path.py:function returning a policy.")],
    out: Annotated[Path | None, typer.Option(help="Directory that holds the run directories. Default: beside RUN.")] = None,
    workers: Workers = None,
) -> None:
    """Replay the world of a run up to a tick, and decide otherwise from there."""
    from fedsim.branching import fork, fork_directory

    stored, other = _stored(run), _policy(policy)
    ctx.obj["path"] = fork_directory(stored, at=at, policy=other, out=out)
    with _executor(workers) as executor:
        _tell(fork(stored, at=at, policy=other, out=out, executor=executor))


@main.command()
def compare(
    ctx: typer.Context,
    recipe: RecipeText,
    policies: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "never,periodic:40,alarm,oracle",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to this number less one.")] = 5,
    out: Out = Path("runs"),
    workers: Workers = None,
) -> None:
    """Let several policies meet the same worlds, and compare."""
    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"policies must be different names separated by commas, got {policies!r}")
    simulation = _simulation(recipe)
    chosen = {name: _policy(name) for name in names}
    from fedsim.comparison import compare

    ctx.obj["again"] = True
    with _executor(workers) as executor:
        results = compare(simulation, policies=chosen, seeds=range(seeds), out=out, executor=executor, recipe=str(Recipe.parse(recipe)))
    typer.echo(f"{results.table()}\n")
    typer.echo(results.report())


@main.command()
def demo(ctx: typer.Context, out: Out = Path("runs"), workers: Workers = None) -> None:
    """The whole story on digits in a few minutes: train, prune, drift, detect, re-prune."""
    from fedsim.demo import demo

    ctx.obj["again"] = True
    with _executor(workers) as executor:
        demo(str(out), executor=executor)


@main.command()
def doctor(
    out: Out = Path("runs"),
    address: Annotated[
        str | None, typer.Option(help='Ray cluster to join: "auto" or host:port. Default: a small one is started and stopped.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: versions, cores, memory, disks, Ray, and that batched clients are independent to the last bit.

    The exit code is 1 if something that is needed is missing; every line that is not ok says what to do.
    """
    from fedsim.doctor import examine

    findings = []
    for finding in examine(out, address=address):
        findings.append(finding)
        if not as_json:
            typer.secho(str(finding), fg={"ok": None, "note": "yellow", "failed": "red"}[finding.state])
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(1)


@main.command()
def tune(recipe: RecipeText, seconds: Annotated[float, typer.Option(help="About how long to measure.")] = 20.0) -> None:
    """Time the widths of batched clients (lanes) for a recipe on this machine; the line to put into it is printed, never written."""
    simulation = _simulation(recipe)
    from fedsim.tuning import tune

    typer.echo(tune(simulation, seconds=seconds).table())


@main.command()
def explain(
    recipe: RecipeText,
    workers: Workers = None,
    seconds: Annotated[float, typer.Option(min=0, help="Longest dry run; what is left is extrapolated.")] = 30.0,
) -> None:
    """Say what a recipe will cost before it starts: bytes, FLOPs, simulated and real time, memory. A plan that cannot run is refused with the reason."""
    simulation = _simulation(recipe)
    from fedsim.explanation import explain

    plan = explain(simulation, workers=None if workers is None else max(1, workers), seconds=seconds)
    if plan.refused:
        raise ValueError(plan.refused)
    typer.echo(plan.table())


@main.command()
def verify(
    run: RunText,
    blocks: Annotated[int, typer.Option(min=1, help="Random blocks of clients to train again.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of their draw.")] = 0,
    reach: Annotated[
        int, typer.Option(min=0, help="Rounds after a stored model from which they are drawn; 0: all, which may take as long as the run.")
    ] = 10,
    workers: Annotated[int, typer.Option(min=0, help="Ray actors for whole rounds; 0 runs in this process.")] = 0,
) -> None:
    """Train random blocks of a stored run again and compare their hashes. The exit code is 1 where they differ."""
    stored = _stored(run)
    from fedsim.verification import verify

    with _executor(workers) as executor:
        found = verify(stored, blocks, seed, reach=reach or None, executor=executor)
    typer.echo(found.table())
    if not found.ok:
        raise typer.Exit(1)


@main.command()
def replay(
    run: RunText,
    round: Annotated[int, typer.Option(min=0, help="Round of training.")],
    client: Annotated[int, typer.Option(min=0, help="A client of its cohort.")],
    stop: Annotated[bool, typer.Option("--breakpoint", help="Open the debugger before every step.")] = False,
) -> None:
    """Train one client of a stored round again, step by step, in this process."""
    stored = _stored(run)
    from fedsim.replaying import replay

    steps = replay(stored, round=round, client=client, breakpoint=stop)
    typer.echo(steps.table())


@main.command("list")
def list_runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that holds the run directories.")] = Path("runs"),
) -> None:
    """List the runs in a directory."""
    if not directory.is_dir():
        raise ValueError(f"no directory {directory}")
    from fedsim.runs.run import Run
    from fedsim.runs.text import aligned, number, share

    rows = []
    for path in sorted(path.parent for path in directory.glob("*/config.json")):
        try:
            stored = Run(path)
            scores = stored.scores()
        except FedsimError as error:
            typer.secho(f"{path.name}: {' '.join(str(error).split())}", fg="red", err=True)
            continue
        progress = [f"{len(stored.rounds()):,}", f"{scores.num_ticks:,}"]
        rows.append([path.name, stored.status(), *progress, share(scores.test_accuracy), share(scores.accuracy_end), number(scores.harm)])
    header = ["run", "status", "rounds", "ticks", "test accuracy", "changed, at the end", "harm"]
    typer.echo(aligned(header, rows) if rows else f"no runs in {directory}")


def _simulation(recipe: str, *, seed: int | None = None, name: str | None = None) -> Any:
    from fedsim.simulation import Simulation

    simulation = Recipe.parse(recipe).build()
    if not isinstance(simulation, Simulation):
        raise ValueError(f"{recipe} must return a Simulation, got {type(simulation).__name__}")
    changes: dict[str, Any] = {key: value for key, value in (("seed", seed), ("name", name)) if value is not None}
    return dataclasses.replace(simulation, **changes)


def _stored(text: str, *, recipe: bool = True) -> "Run":
    """The run ``text`` names. To go on with it, the recipe it came from is imported and its classes are trusted."""
    from fedsim.runs.run import Run

    path = _run_path(text)
    return Run(path, trusted=_trusted(path) if recipe else ())


def _trusted(path: Path) -> tuple[str, ...]:
    from fedsim.runs.run import Run

    recipe = Run(path).recipe
    return Recipe.parse(recipe).packages() if recipe else ()


def _run_path(text: str) -> Path:
    if Path(text).is_dir():
        return Path(text)
    found = sorted(path.parent for path in Path("runs").glob("*/config.json") if path.parent.name.startswith(text))
    if len(found) != 1:
        raise ValueError(
            f"no run directory {text}" if not found else f"{text} is the start of several runs: {', '.join(p.name for p in found)}"
        )
    return found[0]


@contextmanager
def _executor(workers: int | None) -> "Iterator[Executor | None]":
    """What ``--workers`` asks for, closed at the end; ``None`` leaves the choice to the engine."""
    if workers is None:
        yield None
    elif workers == 0:
        from fedsim.runtime.serial import SerialExecutor

        with SerialExecutor() as serial:
            yield serial
    else:
        from fedsim.driver import gpu_share
        from fedsim.runtime.ray import RayExecutor

        with RayExecutor(workers=workers, gpus_per_worker=gpu_share(workers)) as ray:
            yield ray


def _policy(text: str) -> "Policy":
    """``periodic:40``, ``alarm:latency=5+window=32``, or a recipe that returns a policy."""
    from fedsim.policies import Never, Oracle, Periodic, Policy, RepruneOnAlarm

    name, _, arguments = text.partition(":")
    shipped: dict[str, tuple[type[Policy], str]] = {
        "never": (Never, ""),
        "periodic": (Periodic, "every"),
        "alarm": (RepruneOnAlarm, "latency"),
        "oracle": (Oracle, "latency"),
    }
    if name not in shipped:
        if ":" not in text and not text.endswith(".py"):
            raise ValueError(f"policy must be one of {sorted(shipped)} or path.py:function, got {text!r}")
        made = Recipe.parse(text, default="policy").build()
        if not isinstance(made, Policy):
            raise ValueError(f"{text} must return a policy, got {type(made).__name__}")
        return made
    kind, first = shipped[name]
    try:
        return kind(**dict(_argument(part, first) for part in arguments.split("+") if part))
    except TypeError as error:
        raise ValueError(
            f"policy {text!r}: {error}; write {name}:FIELD=VALUE+FIELD=VALUE, for example periodic:40 or alarm:latency=5"
        ) from error


def _argument(part: str, first: str) -> tuple[str, int | str]:
    key, separator, value = part.partition("=")
    key, value = (key, value) if separator else (first, part)
    return key, int(value) if value.lstrip("-").isdigit() else value


def _tell(run: "Run") -> None:
    typer.echo(f"{run.summary()}\n\nstored in {run.path}; draw it with: fedsim report {run.path}")
