"""A whole simulation in about a second: what the end-to-end tests run."""

from dataclasses import replace
from typing import Any

import fedsim as fs


def simulation(**changes: Any) -> fs.Simulation:
    """Twelve clients in two domains, eight rounds, 100 ticks; half of them move to the other domain at tick 40."""
    base = fs.Simulation(
        name="tiny",
        task=fs.tasks.Digits(hidden=(64, 64), domains=("upright", "inverted")),
        fleet=fs.Fleet.sample(12, partition=fs.Dirichlet(alpha=0.1, by="domain", minimum=32), seed=0),
        strategy=fs.FedAvg(client_lr=0.1, cohort=8, local_steps=32, momentum=0.9),
        communication=fs.DynamicFL(high=1, low=32, budget=0.4),
        rounds=8,
        evaluate_every=2,
        deployment=fs.GISP(levels=(0.0, 0.4, 0.6), steps=4, calibration="client", calibration_examples=32),
        serving=fs.Serving(ticks=100, drift=fs.Drift(fs.DomainSwitch(), start=fs.At(40), clients=fs.Fraction(0.5))),
        monitoring=fs.Monitoring(arl=500, calibration=25, recalibration=20),
        policy=fs.RepruneOnAlarm(latency=2, window=32),
        workers=fs.Workers(count=2),
    )
    return replace(base, **changes)


if __name__ == "__main__":
    import sys

    # a driver to be killed: python tiny.py OUT
    fs.simulate(simulation(rounds=13), sys.argv[1], executor=fs.SerialExecutor(), progress=False)
