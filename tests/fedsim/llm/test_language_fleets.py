"""Fleets that train, serve, drift and are pruned on text: the engine's own promises, kept by language models."""

import warnings
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

import fedsim as fs
from fedsim.lanes import lanes_for, why_not_batched
from fedsim.llm import Characters, Documents
from fedsim.llm.decoder import Architecture
from fedsim.nesting import Widths, narrowed
from fedsim.rounds import Training
from fedsim.tasks.base import Wrapped
from tests.fedsim.llm.test_causal_lm import family, sentences, task

DYNAMIC = fs.DynamicFL(high=1, low=4, budget=0.5)


def world(rounds: int = 4, **changes) -> fs.Simulation:
    fields = {
        "task": task(),
        "fleet": fs.Fleet.sample(6, devices="mixed-phones", partition=fs.Dirichlet(alpha=0.05, by="domain"), seed=0),
        "strategy": fs.FedAvg(client_lr=0.05, cohort=6, batch_size=8, local_steps=4),
        "rounds": rounds,
        "evaluate_every": 1,
        "seed": 0,
    }
    return fs.Simulation(**{**fields, **changes})


def losses(simulation: fs.Simulation, executor) -> list[float]:
    return [record.test_loss for record in islice(fs.run(simulation, executor), simulation.rounds)]


@pytest.mark.parametrize("communication", [fs.Uniform(), DYNAMIC], ids=["FedAvg", "DynamicFL"])
def test_a_fleet_learns_to_write(communication):
    found = losses(world(8, communication=communication, lanes=8), fs.SerialExecutor())
    assert found[-1] < 0.8 * found[0]


@pytest.mark.ray
@pytest.mark.slow
def test_workers_do_not_change_a_bit():
    worlds = [world(3, communication=communication, lanes=lanes) for communication, lanes in ((fs.Uniform(), None), (DYNAMIC, 4))]
    expected = [losses(simulation, fs.SerialExecutor()) for simulation in worlds]
    for workers in (1, 2):
        with fs.RayExecutor(workers=workers) as executor:
            assert [losses(simulation, executor) for simulation in worlds] == expected


@pytest.mark.parametrize("architecture", Architecture.__args__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lanes_train_language_models_as_the_loop_does(architecture, attention):
    lm = task(model=family(architecture, attention=attention), pack=False, length=44)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert why_not_batched(lm, lm.build(0), lm.data().train.batch(np.arange(4))) is None
    assert lanes_for(lm, lm.build(0), lm.data().train.batch(np.arange(4))) == 1
    alone, together = (losses(world(2, task=lm, lanes=lanes), fs.SerialExecutor()) for lanes in (1, 4))
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_the_first_round_says_that_clients_train_one_at_a_time():
    first = next(iter(fs.run(world(1), fs.SerialExecutor())))
    assert (
        "clients train one at a time, not as lanes of one program (its layers are not known to be faster so; lanes= may be set)"
        in first.note
    )


@pytest.mark.parametrize(
    ("texts", "key"), [({"up": sentences(60, 1, 0), "down": sentences(60, 9, 1)}, "domain"), (sentences(60, 1, 0), "author")]
)
def test_schedules_read_in_what_the_clients_differ(texts, key):
    lm = task(texts=texts)
    assert lm.skew_key == key
    simulation = world(task=lm, fleet=fs.Fleet.sample(6, partition=fs.ByKey(key), seed=0), communication=DYNAMIC)
    training = Training.prepare(
        task=lm,
        fleet=simulation.fleet,
        strategy=simulation.strategy,
        communication=DYNAMIC,
        rounds=1,
        evaluate_every=1,
        seed=0,
        executor=fs.SerialExecutor(),
    )
    assert_array_equal(training.totals, np.bincount(lm.data().train.keys[key]))
    assert np.isfinite(losses(replace(simulation, rounds=1), fs.SerialExecutor())).all()


@pytest.mark.parametrize("key", ["document", "author", "domain"])
def test_clients_hold_whole_documents_authors_or_domains(key):
    lm = task(pack=False, length=16)
    train = lm.data().train
    owners = len(np.unique(train.keys[key]))
    shards = fs.Fleet.sample(owners, partition=fs.ByKey(key), seed=0).shards(train)
    assert all(len(np.unique(train.keys[key][shards.shard(c)])) == 1 for c in range(owners))
    assert sum(len(shards.shard(c)) for c in range(owners)) == len(train)


def test_a_wrapped_task_is_the_task_in_all_but_its_model():
    lm = task(pack=False, length=44)

    class Same(Wrapped):
        task = lm

    same, model, batch = Same(), lm.build(0), lm.data().test.batch(np.arange(5))
    assert (same.num_classes, same.skew_key, same.domain_names) == (lm.num_classes, lm.skew_key, lm.domain_names)
    assert same.data() is lm.data()
    assert torch.equal(same.example, lm.example)
    assert same.structures(model).fingerprint == lm.structures(model).fingerprint
    for measure in ("losses", "correct"):
        assert torch.equal(getattr(same, measure)(model, batch), getattr(lm, measure)(model, batch))
    for answer in ("logits", "self_targets"):
        assert torch.equal(getattr(same, answer)(model, batch.inputs), getattr(lm, answer)(model, batch.inputs))


def test_weak_devices_train_narrow_language_models():
    lm, widths = task(), Widths(rates=(1.0, 0.5), shares=(1, 1))
    smap, submodels = narrowed(lm, widths)
    assert submodels[1].parameters(smap) < submodels[0].parameters(smap)
    found = losses(
        world(4, strategy=fs.HeteroFL(client_lr=0.05, cohort=6, batch_size=8, local_steps=4, widths=widths)), fs.SerialExecutor()
    )
    assert found[-1] < found[0]


@pytest.mark.slow
def test_language_clients_train_deploy_recover_serve_drift_and_are_repruned(tmp_path):
    simulation = world(
        3,
        lanes=8,
        deployment=fs.GISP(levels=(0.0, 0.3, 0.5), steps=3, calibration_examples=16),
        recovery_rounds=1,
        serving=fs.Serving(ticks=60, batch=4, drift=fs.Drift(fs.DomainSwitch(), start=fs.At(40))),
        monitoring=fs.Monitoring(arl=1000, calibration=30),
        policy=fs.Periodic(every=10, action=fs.Reprune(window=16)),
    )
    run = fs.simulate(simulation, out=tmp_path, executor=fs.SerialExecutor())
    kinds = run.events().column("kind").to_pylist()
    assert "request" in kinds
    assert {"redeployment", "rejected"} & set(kinds)
    assert len(set(run.deployments().column("level").to_pylist())) > 1
    assert any("recovery of level" in note for note in run.rounds().column("note").to_pylist())


@pytest.mark.slow
def test_a_switch_of_domains_serves_text_of_the_other_domain():
    coins = tuple("".join("cd"[c] for c in row) for row in np.random.default_rng(0).integers(2, size=(8, 60)))
    lm = task(texts={"sure": Documents(("a" * 60,) * 8), "chance": Documents(coins)}, tokenizer=Characters("abcd"), length=10)
    train, fleet = lm.data().train, fs.Fleet.sample(2, partition=fs.ByKey("domain"), seed=0)
    homes = [train.keys["domain"][fleet.shards(train).shard(c)][0] for c in range(2)]
    simulation = world(
        5,
        task=lm,
        fleet=fleet,
        strategy=fs.FedAvg(client_lr=0.2, cohort=2, batch_size=8),
        deployment=fs.GISP(levels=(0.0,)),
        serving=fs.Serving(ticks=20, batch=4, drift=fs.Drift(fs.DomainSwitch(), start=fs.At(10), clients=fs.Fraction(1.0))),
        monitoring=fs.Monitoring(arl=100, calibration=10, recalibration=10),
    )
    served = [record for record in fs.run(simulation, fs.SerialExecutor()) if isinstance(record, fs.Tick)]
    losses = np.array([tick.clients["loss"] for tick in served])
    sure, chance = homes.index(0), homes.index(1)
    before, after = losses[:10].mean(0), losses[10:].mean(0)
    assert before[chance] - before[sure] > 0.3
    assert after[sure] - after[chance] > 0.3
