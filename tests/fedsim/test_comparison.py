import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import fedsim as fs
from fedsim.comparison import bootstrap

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
