"""Run every study and benchmark and print one table: claim, measured value, bar, whether it holds. ``python -m experiments.claims [--quick]``.

Exits with 1 when a claim does not hold or a study fails, with 2 for a study that does not exist.
"""

import argparse
import pkgutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from experiments import benchmarks, studies
from experiments.study import Claim, Outcome, conduct, provenance, table
from fedsim.runs.files import write_json


def names() -> dict[str, str]:
    """Modules of ``experiments.studies`` and ``experiments.benchmarks`` without a leading underscore: by name, where they are."""
    found = {m.name: f"{package.__name__}.{m.name}" for package in (studies, benchmarks) for m in pkgutil.iter_modules(package.__path__)}
    return {name: found[name] for name in sorted(found) if not name.startswith("_")}


def run_study(name: str, quick: bool, out: Path) -> Sequence[Claim]:
    """Import a study and run it, so that a module that cannot be imported fails like one that raises."""
    claims: Sequence[Claim] = import_module(names()[name]).run(quick, out)
    return claims


def run_all(chosen: Sequence[str], quick: bool, out: Path) -> list[Outcome]:
    outcomes = []
    for name in chosen:
        print(f"== {name}", flush=True)
        outcomes.append(conduct(name, partial(run_study, name), quick, out / name))
        print(flush=True)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.claims", description="Measure the project's claims.")
    parser.add_argument("--study", action="append", metavar="NAME", help="only this study; may be given again")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and settings, for two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes to one JSON file")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder with a folder for each study")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.study or ()) - set(names()))
    if unknown:
        parser.error(f"no study is named {', '.join(unknown)}; there are {', '.join(names())}")
    outcomes = run_all(options.study or list(names()), options.quick, options.out)
    print(table(outcomes))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {"studies": [outcome.as_json() for outcome in outcomes], **provenance(options.quick)})
    return 0 if all(outcome.holds for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
