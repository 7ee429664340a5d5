import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import benchmarks, claims, settings, studies
from experiments.studies import cifar10_rounds, communication
from experiments.study import Claim, Outcome, conduct, standard_error, table
from experiments.training import Curves, train
from fedsim.clock import round_seconds
from fedsim.communication import Cohort, DynamicFL, Uniform, UploadSchedule
from fedsim.fleet import Fleet

HEADER = "from experiments.study import Claim, Skipped\n"
GOOD = HEADER + "def run(quick, out): return [Claim.measured('gain', [9.0, 11.0], bar='>= 8 points')]"
LOW = HEADER + "def run(quick, out): return [Claim.measured('gain', [1.0, 3.0], bar='>= 8 points', note='too few rounds')]"
RAISES = "def run(quick, out): raise RuntimeError('disk on fire')"
SKIPS = HEADER + "def run(quick, out): raise Skipped('no pictures; set FEDSIM_DATA')"


@pytest.fixture
def write_studies(tmp_path, monkeypatch):
    """Replaces the shipped studies by the given sources."""
    folder = tmp_path / "studies"
    folder.mkdir()
    monkeypatch.setattr(studies, "__path__", [str(folder)])
    monkeypatch.setattr(benchmarks, "__path__", [])

    def write(**sources):
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, f"experiments.studies.{name}", raising=False)

    yield write
    for path in folder.glob("*.py"):
        sys.modules.pop(f"experiments.studies.{path.stem}", None)
        if hasattr(studies, path.stem):
            delattr(studies, path.stem)


def claims_main(tmp_path: Path, *arguments: str) -> int:
    return claims.main(["--out", str(tmp_path / "results"), *arguments])


@pytest.mark.parametrize(
    ("bar", "value", "holds"),
    [(">= 8 points", 8.0, True), (">= 8 points", 7.99, False), ("<= 2 %", 2.0, True), ("> 0", 0.0, False), ("< -0.5 s", -0.6, True)],
)
def test_a_claim_holds_when_its_value_meets_its_bar(bar, value, holds):
    assert Claim(name="x", value=value, spread=0.1, bar=bar, seeds=2).holds is holds


@pytest.mark.parametrize("bar", [">= 0", "<= 0", "> 0", "< 0"])
def test_an_undefined_value_meets_no_bar(bar):
    assert not Claim(name="x", value=float("nan"), spread=0.0, bar=bar, seeds=1).holds


@pytest.mark.parametrize("bar", ["8 points", ">= many", "", "== 3"])
def test_a_bar_without_operator_and_number_is_refused(bar):
    with pytest.raises(ValueError, match="bar of 'gain'"):
        Claim(name="gain", value=1.0, spread=0.0, bar=bar, seeds=1)


def test_a_claim_on_numpy_numbers_can_be_written_as_json():
    claim = Claim(name="x", value=np.float32(0.5), spread=np.float64("nan"), bar="<= 2 %", seeds=2)
    assert json.loads(json.dumps(claim.as_json()))["holds"] is True


def test_spread_is_the_standard_error_of_the_mean():
    samples = [1.0, 4.0, 7.0, 8.0]
    assert standard_error(samples) == pytest.approx(np.std(samples, ddof=1) / 2)
    assert np.isnan(standard_error([1.0]))


def test_all_claims_hold_exits_with_zero_and_writes_the_results(write_studies, tmp_path, capsys):
    write_studies(good=GOOD)
    assert claims_main(tmp_path, "--quick", "--json", str(tmp_path / "new" / "all.json")) == 0
    stored = json.loads((tmp_path / "results" / "good" / "results.json").read_text())
    assert stored["claims"] == [{"name": "gain", "value": 10.0, "spread": 1.0, "bar": ">= 8 points", "holds": True, "seeds": 2, "note": ""}]
    assert stored["status"] == "done"
    assert stored["quick"] is True
    assert {"date", "machine", "versions"} <= set(stored)
    assert json.loads((tmp_path / "new" / "all.json").read_text())["studies"][0]["claims"] == stored["claims"]
    assert "good: gain" in capsys.readouterr().out


def test_a_claim_below_its_bar_keeps_its_value_and_exits_with_one(write_studies, tmp_path, capsys):
    write_studies(good=GOOD, low=LOW)
    assert claims_main(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "2 +- 1" in shown
    assert "too few rounds" in shown


def test_a_study_that_raises_fails_and_the_others_still_run(write_studies, tmp_path, capsys):
    write_studies(broken=RAISES, good=GOOD, unreadable="import no_such_module")
    assert claims_main(tmp_path) == 1
    shown = capsys.readouterr()
    assert "broken failed: RuntimeError: disk on fire" in shown.out
    assert "unreadable failed: ModuleNotFoundError" in shown.out
    assert "10 +- 1" in shown.out
    assert "disk on fire" in shown.err


def test_a_study_without_its_data_is_skipped_not_failed(write_studies, tmp_path, capsys):
    write_studies(absent=SKIPS)
    assert claims_main(tmp_path) == 0
    assert json.loads((tmp_path / "results" / "absent" / "results.json").read_text())["status"] == "skipped: no pictures; set FEDSIM_DATA"
    assert "no pictures" in capsys.readouterr().out


def test_only_the_chosen_study_runs_and_an_unknown_one_is_named(write_studies, tmp_path, capsys):
    write_studies(good=GOOD, broken=RAISES)
    assert claims_main(tmp_path, "--study", "good") == 0
    with pytest.raises(SystemExit) as stopped:
        claims_main(tmp_path, "--study", "god")
    assert stopped.value.code == 2
    assert "no study is named god; there are broken, good" in capsys.readouterr().err


def test_the_table_says_no_where_a_claim_does_not_hold():
    claim = Claim(name="gain", value=1.0, spread=float("nan"), bar=">= 2", seeds=1)
    line = table([Outcome(study="s", status="done", claims=(claim,))]).splitlines()[1]
    assert line.split() == ["s:", "gain", "1", ">=", "2", "NO", "1"]


def test_absent_pictures_skip_the_cifar_study(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    outcome = conduct("cifar10_rounds", cifar10_rounds.run, True, tmp_path / "out")
    assert outcome.status == "skipped"
    assert "no train.parquet and no test.parquet; set FEDSIM_DATA" in outcome.reason


def test_the_last_accuracy_within_a_budget_is_marked_once_the_schedule_has_ended():
    spent, accuracy = np.array([1.0, 2.0]), np.array([0.3, 0.4])
    assert [cifar10_rounds.within(spent, accuracy, budget) for budget in (0.5, 1.5, 2.0, 3.0)] == ["–", "30.0", "40.0", "40.0*"]


def curves(accuracy: list[float], seconds: float = 1.0) -> Curves:
    by_round = np.arange(1.0, len(accuracy) + 1)
    return Curves(np.array(accuracy), by_round, by_round, by_round, seconds * by_round, by_round)


def test_final_accuracy_is_the_mean_of_the_last_five_of_twenty_rounds():
    rising = [r / 20 for r in range(1, 21)]
    assert curves(rising, seconds=1.93).final() == pytest.approx(np.mean(rising[15:]))


def test_a_training_that_diverged_has_no_final_accuracy():
    assert np.isnan(curves([0.4, 0.5, float("nan")]).final())


@pytest.mark.parametrize("uploads", [1.0, 1.04, 3.788, 4.3, 19.9, 64.0])
def test_a_matched_uniform_schedule_spends_its_total_to_half_an_upload(uploads):
    schedule: UploadSchedule = settings.UniformTotal(uploads=uploads)
    cohort = cohort_of(settings.Setting(title="", hidden=(), labels=1, cohort=10, methods=()).fleet(0), range(10))
    rounds = [schedule.assign(cohort, r, 0) for r in range(20)]
    assert all(len(set(r.points)) == 1 for r in rounds)
    assert abs(sum(len(r.points[0]) for r in rounds) - 20 * uploads) <= 0.5 + 1e-9


def cohort_of(fleet: Fleet, clients, size: int = 9640) -> Cohort:
    chosen = np.array(clients, np.int64)
    return Cohort(
        clients=chosen,
        steps=settings.STEPS,
        fleet_size=len(fleet),
        upload=size + 8,
        download=size,
        step_seconds=1e5 / fleet.flops[chosen],
        up_seconds=(size + 8) / fleet.up[chosen],
        down_seconds=size / fleet.down[chosen],
        counts=np.eye(10)[chosen % 10],
        totals=np.full(10, 10.0),
    )


def test_in_equal_time_only_fast_clients_join_the_group_and_the_round_lasts_as_long_as_that_of_fedavg():
    fleet = communication.equal_time("", 1).fleet(3)
    fast = fleet.up > settings.SLOW
    assert fast.sum() == 30
    chosen, everyone = DynamicFL(high=1, budget=1.0, clients="by-link"), communication.EveryFastClient(high=1)
    for round in range(20):
        cohort = cohort_of(fleet, np.sort(np.random.default_rng(round).choice(100, 10, replace=False)))
        plain, dynamic, every = (s.assign(cohort, round, 0) for s in (Uniform(), chosen, everyone))
        able = np.flatnonzero(fast[cohort.clients])
        assert set(dynamic.group) <= set(able)
        if len(able) > 1:
            assert len(dynamic.group) > 1
            np.testing.assert_array_equal(every.group, able)
        lasts = [round_seconds(s.points, cohort.step_seconds, cohort.up_seconds, cohort.down_seconds) for s in (plain, dynamic, every)]
        assert lasts[1:] == pytest.approx([lasts[0]] * 2, rel=1e-3)


class OwnProcess:
    """Trains here, so that a test starts no processes."""

    def train(self, trials):
        return [train(trial) for trial in trials]


def test_a_setting_is_measured_with_matched_bytes_and_every_method_in_the_table(monkeypatch, capsys):
    monkeypatch.setattr(settings, "STEPS", 8)
    monkeypatch.setattr(communication, "STEPS", 8)
    monkeypatch.setattr(settings, "RATES", {(): (0.3,)})
    monkeypatch.setattr(settings, "TUNING_SEEDS", (1000,))
    setting = communication.equal_bytes("tiny", (), 1, 10, 5, 1)
    setting = replace(setting, methods=tuple(replace(m, rounds=3) for m in setting.methods))
    results = settings.measure(setting, range(2), OwnProcess())
    shown = capsys.readouterr().out
    assert all(method.name in shown for method in setting.methods)
    half_an_upload, histograms = 100 * 5 / 120, 1.0  # in percent: each of 10 clients uploads about 12 times in the three rounds
    assert communication._mismatch(results) < half_an_upload + histograms
    assert all(len(result.curves) == 2 for result in results.values())
    assert results["FedAvg"].curves[0].uploads[-1] == 30


@pytest.mark.parametrize("module", claims.names().values())
def test_every_shipped_study_can_be_run_by_the_command(module):
    assert callable(importlib.import_module(module).run)
