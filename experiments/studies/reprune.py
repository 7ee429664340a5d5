"""When does re-pruning on an alarm pay, and when not? Digits in four domains, 120 phones, 30 % of them change at tick 125.

A   domain switch, client-calibrated submodels: re-pruning, against an oracle and against tuning or distilling the stale submodel
A'  the same with a small CNN, whose stale masks still hold usable features: re-pruning against its rivals
C   label swap: the dense model is as wrong as its submodels, so the gate must refuse
D   domain switch, universal submodels recovered by fleet training: nothing to gain

A is the best setting for re-pruning of those known to us, not a typical one. Its skew, levels and rate were chosen on seed 0, rate and
rounds of A' on seed 100; measured are seeds from 10 on, which draw another data split, fleet and partition each. All policies of a seed
meet the same streams.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.study import Claim, main
from fedsim.comparison import PolicyComparison, compare
from fedsim.demo import domain_switch, label_swap
from fedsim.driver import given_or_ray
from fedsim.policies import Never, Oracle, Periodic, Policy, RepruneOnAlarm
from fedsim.reactions import Adapt, Reprune
from fedsim.runtime.executor import Executor
from fedsim.simulation import Simulation

World = Callable[[int], Simulation]
FIRST_SEED = 10
RECOVERED, RIVAL, SAME, REFUSED = ">= 0.8 of the oracle's gain", ">= 0.05 accuracy", "<= 0.03 accuracy", ">= 0.5 of requests"

POLICIES: Mapping[str, Policy] = {
    "never": Never(),
    "periodic": Periodic(every=60, latency=5),
    "alarm": RepruneOnAlarm(latency=5),
    "oracle": Oracle(latency=5),
    "alarm, re-prune + tune": RepruneOnAlarm(latency=5, action=Reprune(tune_steps=20)),
    "alarm, distil stale": RepruneOnAlarm(latency=5, action=Adapt(teacher="dense", steps=40)),
    "alarm, tune stale with labels": RepruneOnAlarm(latency=5, action=Adapt(teacher="labels", steps=40)),
}
RIVALS = ("alarm, distil stale", "alarm, tune stale with labels")


def cnn_switch(seed: int) -> Simulation:
    """A': a small CNN at one level, 0.5; rate and rounds by test accuracy before any drift, on a seed that is not measured."""
    base = domain_switch(seed)
    return replace(
        base,
        name="cnn-switch",
        task=replace(base.task, model="cnn"),
        strategy=replace(base.strategy, client_lr=0.4),
        rounds=40,
        deployment=replace(base.deployment, levels=(0.0, 0.5)),
    )


def universal(seed: int) -> Simulation:
    """D: one mask for all, trained by the fleet after pruning."""
    base = domain_switch(seed)
    return replace(base, name="universal-recovered", deployment=replace(base.deployment, calibration="global"), recovery_rounds=10)


def run(quick: bool, out: Path) -> list[Claim]:
    """Five seeds of A; three of the others with ``quick``, else five."""
    seeds = range(FIRST_SEED, FIRST_SEED + 5)
    few = seeds[:3] if quick else seeds
    with given_or_ray(None) as workers, tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        switch = _measure("A: domain switch, MLP, own submodels", domain_switch, tuple(POLICIES), seeds, place, out, workers)
        swap = _measure("C: label swap", label_swap, ("never", "alarm", "oracle", *RIVALS), few, place, out, workers)
        recovered = _measure("D: universal submodels, recovered", universal, ("never", "alarm", "oracle"), few, place, out, workers)
        cnn = _measure("A': domain switch, CNN, own submodels", cnn_switch, ("never", "alarm", "oracle", *RIVALS), few, place, out, workers)
    return [*_pays(switch), *_does_not_pay(swap, recovered, cnn)]


def _pays(switch: PolicyComparison) -> list[Claim]:
    share = switch.recovered("alarm")
    return [
        Claim(
            name="A: alarm recovers, of what the oracle recovers over never",
            value=share.mean,
            spread=(share.high - share.low) / 3.92,  # a 95 % interval is 3.92 standard errors wide
            bar=RECOVERED,
            seeds=len(switch.seeds),
            note=f"ratio of means, 95 % interval over seeds [{share.low:.2f}, {share.high:.2f}]",
        ),
        *(
            Claim.measured(
                f"A: re-prune minus '{rival}', accuracy at the end",
                _difference(switch, "alarm", rival, "accuracy_end"),
                bar=RIVAL,
                note="where this falls short, adapting the stale submodel does nearly as well as pruning anew",
            )
            for rival in RIVALS
        ),
    ]


def _does_not_pay(swap: PolicyComparison, recovered: PolicyComparison, cnn: PolicyComparison) -> list[Claim]:
    refused = [s.rejected / max(s.rejected + s.redeployed, 1) for s in swap.scores["alarm"]]
    return [
        Claim.measured("C: the gate refuses, of re-prunes after a label swap", refused, bar=REFUSED),
        Claim.measured(
            "C: alarm minus never, accuracy after", _difference(swap, "alarm", "never"), bar=SAME, note="nothing is gained by re-pruning"
        ),
        Claim.measured(
            "D: oracle minus never, accuracy after", _difference(recovered, "oracle", "never"), bar=SAME, note="nothing is left to gain"
        ),
        Claim.measured(
            "A': re-prune minus distilling the stale CNN, accuracy at the end",
            _difference(cnn, "alarm", "alarm, distil stale", "accuracy_end"),
            bar=SAME,
            note="a stale CNN can be distilled as well as pruned anew",
        ),
    ]


def _measure(
    title: str, world: World, names: Sequence[str], seeds: Sequence[int], place: Path, out: Path, executor: Executor
) -> PolicyComparison:
    chosen = {name: POLICIES[name] for name in names}
    found = compare(world, policies=chosen, seeds=seeds, out=place, executor=executor)
    print(f"{title}, {len(seeds)} seeds\n{found.table()}\n\n{found.differences()}\n", flush=True)
    found.report(out / f"{world(seeds[0]).name}.html")
    return found


def _difference(found: PolicyComparison, first: str, second: str, figure: str = "accuracy_after") -> list[float]:
    return list(map(float, np.subtract(found.values(first, figure), found.values(second, figure))))


if __name__ == "__main__":
    sys.exit(main("reprune", run))
