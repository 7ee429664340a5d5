import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import fedsim as fs
from fedsim.comparison import PolicyComparison, bootstrap, bootstrap_ratio
from fedsim.errors import FedsimError
from fedsim.runs.scores import Scores

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

POLICIES = {"never": fs.Never(), "alarm": fs.RepruneOnAlarm(latency=2, window=32), "oracle": fs.Oracle(latency=2, window=32)}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return fs.compare(tiny.simulation(), policies=POLICIES, seeds=range(2), out=out, executor=fs.SerialExecutor(), progress=False)


def test_policies_share_worlds_and_differ_in_what_they_do(compared):
    np.testing.assert_array_equal(compared.values("never", "accuracy_before"), compared.values("oracle", "accuracy_before"))
    assert (compared.values("oracle", "accuracy_end") > compared.values("never", "accuracy_end")).all()
    assert (compared.values("never", "worker_seconds") == 0).all()
    assert compared.recovered("oracle").mean == 1.0
    assert compared.recovered("never").mean == 0.0


def test_a_compared_run_equals_the_same_run_alone(compared, tmp_path):
    """Shared stages and remembered losses change nothing."""
    together = compared.runs["alarm"][1]
    alone = fs.simulate(together.simulation, tmp_path, executor=fs.SerialExecutor(), progress=False)
    assert alone.digest() == together.digest()


def test_a_function_of_the_seed_replicates_the_fleet_too(tmp_path):
    def world(seed):
        base = tiny.simulation()
        return replace(base, fleet=replace(base.fleet, seed=100 + seed))

    two = fs.compare(world, policies={"never": fs.Never()}, seeds=range(2), out=tmp_path, executor=fs.SerialExecutor(), progress=False)
    assert [run.simulation.fleet.seed for run in two.runs["never"]] == [100, 101]
    assert [run.simulation.seed for run in two.runs["never"]] == [0, 1]


def test_the_table_and_the_page_name_every_policy(compared):
    page = compared.report().read_text()
    for name in POLICIES:
        assert name in compared.table()
        assert name in page
    assert "never" in compared.differences()


def test_bootstrap_intervals_cover_a_known_mean():
    rng = np.random.default_rng(0)
    covered = [low <= 2.0 <= high for low, high in ((i.low, i.high) for i in (bootstrap(rng.normal(2, 1, 20)) for _ in range(300)))]
    assert stats.binomtest(sum(covered), 300, 0.92).pvalue > 0.01, "the percentile interval of 20 values covers about 92 %"


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one policy and one seed"):
        fs.compare(tiny.simulation(), policies={}, seeds=[0])
    assert np.isnan(bootstrap([1.0, float("nan")]).mean)


def made_up(**accuracies):
    """A comparison of policies with the given ``accuracy_after`` in each seed."""
    scores = {name: tuple(Scores(accuracy_after=a, median_delay=a) for a in values) for name, values in accuracies.items()}
    return PolicyComparison({}, scores, tuple(range(len(next(iter(scores.values()))))), Path())


def test_recovered_is_a_ratio_of_means_that_a_seed_with_nothing_to_gain_cannot_rule():
    compared = made_up(never=[0.2, 0.3, 0.5], alarm=[0.6, 0.6, 0.49], oracle=[0.7, 0.8, 0.5])
    recovered = compared.recovered("alarm")
    assert recovered.mean == pytest.approx((0.4 + 0.3 - 0.01) / (0.5 + 0.5 + 0.0))
    assert np.isnan(recovered.low), "a resample of the last seed alone has nothing to recover"
    assert np.isnan(made_up(never=[0.5, 0.6], alarm=[0.5, 0.7], oracle=[0.5, 0.5]).recovered("alarm").mean)


def test_the_interval_of_a_ratio_resamples_seeds_jointly():
    """Where each numerator is the same share of its denominator, the ratio does not vary, however much both do."""
    gains = np.random.default_rng(0).gamma(4, size=12)
    interval = bootstrap_ratio(0.8 * gains, gains)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.8, 0.8, 0.8))
    noisy = bootstrap_ratio(0.8 * gains + np.random.default_rng(1).normal(0, 0.3, 12), gains)
    assert noisy.low < noisy.mean < noisy.high


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_mean(bad):
    assert np.isnan(bootstrap([1.0, bad]).mean)
    assert np.isnan(bootstrap_ratio([1.0, bad], [1.0, 1.0]).mean)


def test_a_mean_over_some_seeds_says_over_how_many():
    table = made_up(never=[float("nan"), 11.0, 13.0], alarm=[10.0, 11.0, 12.0], periodic=[float("nan")] * 3).table()
    never, alarm, periodic = table.splitlines()[-3:]
    assert "12 (2 of 3)" in never
    assert " of " not in alarm + periodic
    assert "MB moved" in table


def test_an_unknown_policy_or_figure_is_refused():
    compared = made_up(never=[0.5])
    with pytest.raises(ValueError, match=r"figure must be one of num_clients, .*harm_changed; got 'typo'"):
        compared.values("never", "typo")
    with pytest.raises(ValueError, match=r"policy must be one of \['never'\], got 'alarm'"):
        compared.values("alarm", "harm")


class NoMatplotlib:
    """An import finder of a machine on which it is not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_without_matplotlib_a_page_is_refused_with_the_way_to_get_it(compared, monkeypatch):
    for name in ("fedsim.runs.report", "matplotlib.figure", "matplotlib"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoMatplotlib, *sys.meta_path])
    for write in (compared.report, compared.runs["never"][0].report):
        with pytest.raises(FedsimError, match=r"pip install 'fedsim\[plots\]'"):
            write()
