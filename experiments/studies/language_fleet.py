"""Sixty language clients whose text changes its domain: what re-pruning on an alarm is worth, as for pictures.

A model trained at one place on the three domains (an encyclopaedia, plays, program code) goes on training over clients that live mostly in
one of them; each gets a submodel calibrated on its own text, and 30 % of the clients move to another domain. All policies of a seed meet
the same streams; skipped where the texts are absent.
"""

import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import fedsim as fs
from experiments.language import SHAKESPEARE, WIKITEXT, text, trained
from experiments.study import Claim, main
from fedsim.comparison import PolicyComparison, compare
from fedsim.driver import given_or_ray
from fedsim.llm.causal_lm import CausalLM
from fedsim.llm.decoder import Decoder, Folder
from fedsim.llm.text import PythonSource
from fedsim.llm.tokens import Bytes
from fedsim.policies import Policy

CLIENTS, TICKS, CHANGE = 60, 240, 140
MODEL = Decoder(layers=2, width=48, heads=4, kv_heads=2, hidden=128)
POLICIES: Mapping[str, Policy] = {
    "never": fs.Never(),
    "periodic": fs.Periodic(every=60, latency=5),
    "alarm": fs.RepruneOnAlarm(latency=5),
    "alarm, regrow": fs.RepruneOnAlarm(latency=5, action=fs.Reprune(mode="regrow")),
    "oracle": fs.Oracle(latency=5),
}


def task(seed: int, model: Decoder | Folder) -> CausalLM:
    domains = {"articles": text(WIKITEXT[0]), "plays": text(SHAKESPEARE), "code": PythonSource()}
    return CausalLM(texts=domains, model=model, tokenizer=Bytes(), length=32, train_limit=12_000, test_limit=6_000, seed=seed)


def begun(seed: int, out: Path) -> Folder:
    """The model before it meets the fleet."""
    start, folder = task(seed, MODEL), out / f"begun-{seed}"
    trained(start, seed, steps=1500, kept=out / "models").save_pretrained(folder)  # type: ignore[operator]
    return Folder(str(folder))


def world(seed: int, out: Path) -> fs.Simulation:
    """Sixty clients, mostly of one domain each."""
    return fs.Simulation(
        name="language-fleet",
        task=task(seed, begun(seed, out)),
        fleet=fs.Fleet.sample(CLIENTS, devices="mixed-phones", partition=fs.Dirichlet(alpha=0.05, by="domain"), seed=seed),
        strategy=fs.FedAvg(client_lr=0.1, clip=1.0, cohort=12, batch_size=16, local_steps=8),
        rounds=10,
        evaluate_every=5,
        deployment=fs.GISP(levels=(0.0, 0.5, 0.6), steps=6, calibration="client", calibration_examples=64),
        serving=fs.Serving(ticks=TICKS, batch=4, drift=fs.Drift(fs.DomainSwitch(), start=fs.At(CHANGE), clients=fs.Fraction(0.3))),
        seed=seed,
    )


def run(quick: bool, out: Path) -> list[Claim]:
    """Two seeds with ``quick``, else five."""
    seeds = range(2 if quick else 5)
    with given_or_ray(None) as workers, tempfile.TemporaryDirectory() as scratch:
        found = compare(partial(world, out=out), policies=POLICIES, seeds=seeds, out=Path(scratch), executor=workers)
        print(f"language clients, {len(seeds)} seeds\n{found.table()}\n\n{found.differences()}\n", flush=True)
        found.report(out / "language_fleet.html")
    return [recovered(found, name) for name in ("alarm", "alarm, regrow")]


def recovered(found: PolicyComparison, name: str) -> Claim:
    share = found.recovered(name)
    return Claim(
        name=f"language clients: '{name}' recovers, of what the oracle recovers over never",
        value=share.mean,
        spread=(share.high - share.low) / 3.92,
        bar="> 0 of the oracle's gain",
        seeds=len(found.seeds),
        note=f"ratio of means, 95 % interval over seeds [{share.low:.2f}, {share.high:.2f}]",
    )


if __name__ == "__main__":
    sys.exit(main("language_fleet", run))
