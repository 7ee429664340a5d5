"""The main job on real pictures in a few minutes: where re-pruning on an alarm pays, and one case where it must not."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.communication import DynamicFL
from fedsim.comparison import PolicyComparison, compare
from fedsim.drift import At, DomainSwitch, Drift, Fraction, LabelSwap
from fedsim.fleet import Fleet
from fedsim.monitoring import Monitoring
from fedsim.partition import Dirichlet
from fedsim.policies import Never, Oracle, Periodic, Policy, RepruneOnAlarm
from fedsim.pruning import GISP
from fedsim.runtime.executor import Executor
from fedsim.simulation import Simulation
from fedsim.strategies import FedAvg
from fedsim.stream import Serving
from fedsim.tasks import Digits
from fedsim.workers import Workers

if TYPE_CHECKING:
    from rich.console import Console

CHANGE = 125


def domain_switch(seed: int = 0) -> Simulation:
    """Setting A: 120 phones share a model of four domains; each serves a submodel fitted to its own; 30 % move to inverted pictures.

    ``seed`` draws all of it: the data split, the fleet and its partition, training, streams.
    """
    return Simulation(
        name="domain-switch",
        task=Digits(domains=("upright", "rotated", "inverted", "noisy"), seed=seed),
        fleet=Fleet.sample(120, devices="mixed-phones", partition=Dirichlet(alpha=0.05, by="domain", minimum=32), seed=seed),
        strategy=FedAvg(client_lr=0.25, cohort=20),
        communication=DynamicFL(high=1, low=64, budget=0.3),
        rounds=30,
        deployment=GISP(levels=(0.0, 0.5, 0.6, 0.7), calibration="client"),
        serving=Serving(ticks=250, drift=Drift(DomainSwitch(to="inverted"), start=At(CHANGE), clients=Fraction(0.3))),
        monitoring=Monitoring(arl=10_000),
        workers=Workers(count=4),
        seed=seed,
    )


def label_swap(seed: int = 0) -> Simulation:
    """Setting C: the pictures stay, four labels change places. The dense model is as wrong as its submodels, so pruning it anew cannot help."""
    serving = Serving(ticks=250, drift=Drift(LabelSwap(cycle=4), start=At(CHANGE), clients=Fraction(0.3)))
    return replace(domain_switch(seed), name="label-swap", serving=serving)


def policies() -> dict[str, Policy]:
    """What the demo compares."""
    return {"never": Never(), "periodic": Periodic(every=60), "alarm": RepruneOnAlarm(latency=5), "oracle": Oracle(latency=5)}


def demo(out: str | Path = "runs", *, executor: Executor | None = None) -> None:
    """Run both settings under ``out``, print one table each, write a page for each comparison and one for a single run."""
    from rich.console import Console

    from fedsim.driver import given_or_ray

    console = Console(highlight=False)
    place = Path(out)
    with given_or_ray(executor) as workers:
        console.print(f"[bold]fedsim demo[/]: 120 phones on {workers.workers} workers\n")
        switch = compare(domain_switch(), policies=policies(), out=place, executor=workers)
        _tell(console, "A domain switch: the model knows the new pictures, the deployed submodels do not", switch)
        console.print(f"re-pruning on alarm recovers {switch.recovered('alarm').mean:.0%} of what an oracle recovers over doing nothing\n")
        chosen = {name: policy for name, policy in policies().items() if name in ("never", "alarm")}
        swap = compare(label_swap(), policies=chosen, out=place, executor=workers)
        _tell(console, "A label swap: no submodel of the model can help, and the gate has to refuse", swap)
    page = switch.runs["alarm"][0].report()
    console.print("Pages to open:")
    for path in (page, switch.report(place / "domain-switch.html"), swap.report(place / "label-swap.html")):
        console.print(f"  {path}", soft_wrap=True)


def _tell(console: "Console", title: str, comparison: PolicyComparison) -> None:
    console.print(f"[bold]{title}[/]")
    console.print(comparison.table(), markup=False, soft_wrap=True)
