"""What compressed uploads cost in accuracy and save in bytes: federated averaging of scikit-learn's digits under label skew.

100 clients with two labels each, cohort 20, 16 local steps on batches of 8, 60 rounds of a 64-32-10 perceptron. The rate is the best of three for
uncompressed averaging on seeds that are not used again, and the same for all. Accuracy is the mean over the last quarter of the rounds.
"""

import sys
from math import nan
from pathlib import Path
from statistics import fmean

import numpy as np

from experiments.study import Claim, main, save_figure, standard_error
from experiments.training import Trial, trainers
from fedsim.communication import Compression, ErrorFeedback, Quantised, Sign, TopK, Uniform
from fedsim.fleet import Fleet
from fedsim.partition import LabelShards
from fedsim.runs.style import BLUE, GREEN, GREY, NARROW, ORANGE, figure, styled
from fedsim.runs.text import aligned
from fedsim.strategies import FedAvg
from fedsim.tasks import Digits

ROUNDS, RATES, TUNING = 60, (0.1, 0.3, 0.5), (1000, 1001)
METHODS: dict[str, Compression | None] = {
    "none": None,
    "8 bits": Quantised(bits=8),
    "4 bits": Quantised(bits=4),
    "top 10 %": TopK(share=0.1),
    "top 10 % + feedback": ErrorFeedback(inner=TopK(share=0.1)),
    "top 1 %": TopK(share=0.01),
    "top 1 % + feedback": ErrorFeedback(inner=TopK(share=0.01)),
    "top 10 % in 8 bits + feedback": ErrorFeedback(inner=TopK(share=0.1, values=Quantised(bits=8))),
    "signs": Sign(),
    "signs + feedback": ErrorFeedback(inner=Sign()),
}


def run(quick: bool, out: Path) -> list[Claim]:
    """5 seeds with ``quick``, else 20."""
    seeds = range(5 if quick else 20)
    with trainers() as pool:
        tuned = pool.train([_trial(None, rate, seed) for rate in RATES for seed in TUNING])
        means = [fmean(c.final() for c in tuned[i * len(TUNING) : (i + 1) * len(TUNING)]) for i in range(len(RATES))]
        rate = RATES[int(np.argmax(means))]
        found = pool.train([_trial(rule, rate, seed) for rule in METHODS.values() for seed in seeds])
    results = {name: found[i * len(seeds) : (i + 1) * len(seeds)] for i, name in enumerate(METHODS)}
    accuracy = {name: [100 * c.final() for c in curves] for name, curves in results.items()}
    share = {name: float(curves[0].bytes_up[-1] / results["none"][0].bytes_up[-1]) for name, curves in results.items()}
    rows = [
        [
            name,
            f"{fmean(accuracy[name]):.1f} +- {standard_error(accuracy[name]):.1f}",
            f"{100 * share[name]:.1f} %",
            f"{results[name][0].bytes_up[-1] / 1e6:.2f} MB",
        ]
        for name in METHODS
    ]
    print(f"Rate {rate:g}, {len(seeds)} seeds\n{aligned(['uploads', 'accuracy', 'of the bytes up', 'bytes up'], rows)}\n", flush=True)
    _draw(accuracy, share, out)

    def lost(a: str, b: str) -> list[float]:
        return [x - y for x, y in zip(accuracy[a], accuracy[b], strict=True)]

    return [
        Claim.measured(
            "8 bits: accuracy lost against none",
            lost("none", "8 bits"),
            bar="<= 1 points",
            note=f"{100 * share['8 bits']:.0f} % of the bytes",
        ),
        Claim(name="8 bits: share of the bytes up", value=share["8 bits"], spread=nan, bar="<= 0.27", seeds=1),
        Claim.measured("top 1 %: accuracy won by error feedback", lost("top 1 % + feedback", "top 1 %"), bar="> 0 points"),
        Claim.measured("signs: accuracy won by error feedback", lost("signs + feedback", "signs"), bar="> 0 points"),
        Claim.measured(
            "top 10 % in 8 bits + feedback: accuracy lost against none",
            lost("none", "top 10 % in 8 bits + feedback"),
            bar="<= 2 points",
            note=f"{100 * share['top 10 % in 8 bits + feedback']:.1f} % of the bytes",
        ),
    ]


def _trial(compression: Compression | None, rate: float, seed: int) -> Trial:
    columns = dict.fromkeys(("flops", "memory", "up", "down"), np.full(100, 1e9))
    return Trial(
        task=Digits(hidden=(32,), seed=seed),
        fleet=Fleet.from_table(columns, partition=LabelShards(2), seed=seed),
        strategy=FedAvg(client_lr=rate, cohort=20, local_steps=16, batch_size=8, compression=compression),
        communication=Uniform(),
        rounds=ROUNDS,
        seed=seed,
    )


@styled
def _draw(accuracy: dict[str, list[float]], share: dict[str, float], out: Path) -> None:
    drawn = figure(NARROW * 1.4, 3.4)
    axes = drawn.subplots()
    for name, values in accuracy.items():
        colour = GREY if name == "none" else GREEN if "feedback" in name else ORANGE if "top" in name or "sign" in name else BLUE
        axes.errorbar(100 * share[name], fmean(values), yerr=standard_error(values), fmt="o", color=colour)
        axes.annotate(name, (100 * share[name], fmean(values)), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="bytes up, % of uncompressed", ylabel="accuracy, %")
    save_figure(drawn, out / "compression.png")


if __name__ == "__main__":
    sys.exit(main("compression", run))
