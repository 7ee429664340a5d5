"""Re-pruning and adapting on real digits: what pays, what the gate must refuse, and what it costs."""

from math import ceil

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from scipy import stats

from fedsim import encoding
from fedsim.drift import ClassPrior, Drift, LabelSwap
from fedsim.errors import DivergedError
from fedsim.fleet import Fleet
from fedsim.parameters import Layout
from fedsim.partition import IID
from fedsim.pruning import GISP, Submodel, lacking
from fedsim.reactions import Adapt, Job, Reprune, react, redeploy_bytes, worth_it
from fedsim.runtime.executor import one_thread
from fedsim.runtime.serial import SerialExecutor
from fedsim.stream import Serving, Stream
from fedsim.submodels import DenseModel, Variant
from fedsim.tasks import Batch, Digits

TASK = Digits(domains=("upright", "inverted"))
PRUNER = GISP(levels=(0.0, 0.6), calibration="client")
N = 64


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    """As in every executor: products split over threads may round differently."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def dense(single_thread):
    """An MLP trained on both domains."""
    torch.manual_seed(0)
    model, train = TASK.build(0), TASK.data().train
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(12):
        for rows in torch.randperm(len(train)).split(64):
            adam.zero_grad()
            TASK.losses(model, train.batch(rows.numpy())).mean().backward()
            adam.step()
    return DenseModel.of(TASK, Layout.of(model).flatten(model), PRUNER)


@pytest.fixture(scope="module")
def shared(dense):
    return {"task": TASK, "params": dense.params, "gisp": PRUNER, "model": dense.digest}


@pytest.fixture(scope="module")
def personal(dense):
    """What a client of upright digits serves: its own submodel at 60 %."""
    data = TASK.data().train
    rows = np.flatnonzero(data.keys["domain"] == 0)[:256]
    return PRUNER.trajectory(dense.module, dense.smap, TASK.losses, [data.batch(rows)]).at(0.6)


def window(domain, num=N, seed=0):
    test = TASK.data().test
    rows = np.random.default_rng(seed).choice(np.flatnonzero(test.keys["domain"] == domain), num)
    return test.inputs[rows], test.targets[rows]


def job(personal, action, domain=1, targets=True, **fields):
    inputs, labels = window(domain, fields.pop("num", N), fields.pop("seed", 0))
    return Job(client=3, action=action, level=1, inputs=inputs, targets=labels if targets else None, kept=personal.kept, **fields)


def accuracy(dense, variant, domain=1):
    test = TASK.data().test
    batch = test.batch(np.flatnonzero(test.keys["domain"] == domain))
    with torch.no_grad():
        return float(TASK.correct(dense.sliced(variant), batch).mean())


def candidate(dense, outcome):
    return Variant(Submodel(outcome.kept, dense.smap.fingerprint, 0.6), outcome.weights)


def test_repruning_after_a_domain_switch_restores_the_client_without_labels(dense, shared, personal):
    before, known = accuracy(dense, Variant(personal), domain=0), accuracy(dense, Variant(Submodel.dense(dense.smap)))
    stale = accuracy(dense, Variant(personal))
    for seed in range(3):
        outcome = react(job(personal, Reprune(), targets=False, seed=seed), shared, {})
        assert outcome.accepted
        assert outcome.weights is None
        after = accuracy(dense, candidate(dense, outcome))
        assert after > stale + 0.5 * (known - stale)
        assert after > 0.8
    assert before > 0.8
    assert stale < 0.5


def test_regrowing_starts_from_what_is_deployed_ships_less_than_a_restart_and_helps(dense, shared, personal):
    restarted, regrown = (react(job(personal, Reprune(mode=mode), targets=False), shared, {}) for mode in ("restart", "regrow"))
    assert regrown.accepted
    assert regrown.bytes_down < restarted.bytes_down
    assert regrown.kept.sum() == personal.kept.sum()
    assert (
        accuracy(dense, Variant(personal))
        < accuracy(dense, candidate(dense, regrown))
        <= accuracy(dense, candidate(dense, restarted)) + 0.05
    )


def test_the_candidate_is_the_submodel_gisp_finds_on_the_first_two_thirds(dense, shared, personal):
    outcome = react(job(personal, Reprune(labels="true")), shared, {})
    inputs, targets = (torch.from_numpy(a[:43]) for a in window(1))
    expected = PRUNER.trajectory(dense.module, dense.smap, TASK.losses, [Batch(inputs, targets)]).at(0.6)
    assert_array_equal(outcome.kept, expected.kept)
    with torch.no_grad():
        targets = TASK.logits(dense.module, inputs).argmax(-1)
    own = PRUNER.trajectory(dense.module, dense.smap, TASK.losses, [Batch(inputs, targets)]).at(0.6)
    assert_array_equal(react(job(personal, Reprune()), shared, {}).kept, own.kept)


def test_the_gate_judges_on_the_last_third_with_true_labels_where_there_are_any(dense, shared, personal):
    outcome = react(job(personal, Reprune()), shared, {})
    held = Batch(*(torch.from_numpy(a[43:]) for a in window(1)))
    with torch.no_grad():
        stale, fresh = (TASK.losses(dense.sliced(v), held).double().numpy() for v in (Variant(personal), candidate(dense, outcome)))
        whole = TASK.losses(dense.module, held).double().numpy()
    assert (outcome.loss_dense, outcome.loss_stale, outcome.loss_candidate) == pytest.approx((whole.mean(), stale.mean(), fresh.mean()))
    assert outcome.gain == pytest.approx((stale - fresh).mean())
    assert outcome.gain_error == pytest.approx(stats.sem(stale - fresh))
    assert outcome.accepted == (outcome.gain > outcome.gain_error)


def test_without_drift_the_gate_refuses_to_ship_the_same_again(shared, personal):
    first = react(job(personal, Reprune(), domain=0), shared, {})
    again = Job(**{**vars(job(personal, Reprune(), domain=0)), "kept": first.kept})
    outcome = react(again, shared, {})
    assert not outcome.accepted
    assert outcome.gain == 0.0
    assert outcome.bytes_down == 0


def test_a_label_swap_is_refused_by_the_gate_for_repruning_and_repaired_by_the_head(dense, shared, personal):
    task = TASK
    stream = Stream.of(task, Fleet.sample(4, partition=IID(), seed=0), Serving(drift=Drift(LabelSwap(cycle=4), at=0)), 0)
    refused, repaired = 0, []
    for client in range(4):
        x, y = stream.draw(client, 0, 16)
        fields = {"client": client, "level": 1, "inputs": x.reshape(-1, 64), "targets": y.reshape(-1), "kept": personal.kept}
        fresh = react(Job(action=Reprune(), **fields), shared, {})
        # the deployed submodel here is what re-pruning would give anyway: only the meaning of labels changed
        fields["kept"] = fresh.kept
        refused += not react(Job(action=Reprune(labels="true"), **fields), shared, {}).accepted
        head = react(Job(action=Adapt(part="head", teacher="labels", steps=60, lr=1e-2), **fields), shared, {})
        repaired.append(head.accepted and head.gain > 1.0)
    assert refused == 4
    assert all(repaired)


def test_distilling_the_stale_submodel_needs_no_labels_and_helps(dense, shared, personal):
    outcome = react(job(personal, Adapt(teacher="dense", steps=32, lr=3e-3), targets=False), shared, {})
    assert outcome.accepted
    assert_array_equal(outcome.kept, personal.kept)
    assert accuracy(dense, candidate(dense, outcome)) > accuracy(dense, Variant(personal)) + 0.1


def test_the_dense_teacher_is_exact_at_its_own_probabilities(dense, shared):
    """A dense student of the dense model has gradient 0, so it does not move (beyond Adam's rounding)."""
    everything = Submodel.dense(dense.smap)
    whole = Job(**{**vars(job(everything, Adapt(teacher="dense", steps=1, lr=1e-3))), "level": 0})
    with torch.no_grad():
        logits = TASK.logits(dense.module, torch.from_numpy(whole.inputs[:43]))
    small = dense.sliced(Variant(everything))
    soft = torch.softmax(logits, -1)
    loss = -(soft * torch.log_softmax(TASK.logits(small, torch.from_numpy(whole.inputs[:43])), -1)).sum(-1).mean()
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in small.parameters()) < 1e-6
    assert react(whole, shared, {}).gain == pytest.approx(0, abs=0.05)


def test_adapting_the_head_changes_the_head_alone(dense, shared, personal):
    outcome = react(job(personal, Adapt(part="head", teacher="labels")), shared, {})
    small = dense.sliced(Variant(personal))
    layout = Layout.of(small)
    old, new = layout.flatten(small), outcome.weights
    head = layout.offsets[layout.names.index("4.weight")] if "4.weight" in layout.names else layout.offsets[-3]
    assert_array_equal(old[:head], new[:head])
    assert not np.array_equal(old[head:], new[head:])


def test_tuning_after_repruning_lowers_the_calibration_loss(dense, shared, personal):
    plain = react(job(personal, Reprune(labels="true")), shared, {})
    tuned = react(job(personal, Reprune(labels="true", tune_steps=20)), shared, {})
    assert_array_equal(plain.kept, tuned.kept)
    calibration = Batch(*(torch.from_numpy(a[:43]) for a in window(1)))
    with torch.no_grad():
        losses = [float(TASK.losses(dense.sliced(candidate(dense, o)), calibration).mean()) for o in (plain, tuned)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("action", [Reprune(), Reprune(tune_steps=5), Adapt(), Adapt(part="head", teacher="labels")], ids=str)
def test_react_is_a_pure_function_whatever_the_cache_and_the_executor_hold(dense, shared, personal, action):
    given = job(personal, action)
    before = encoding.digest(given, dense.params)
    first = react(given, shared, {})
    cache = {}
    react(job(personal, Adapt(steps=2)), shared, cache)
    with SerialExecutor() as executor:
        (mapped,) = executor.map(react, [given], {**shared, "params": executor.share(dense.params)})
    for other in (react(given, shared, cache), react(given, shared, cache), mapped):
        assert encoding.digest(other) == encoding.digest(first)
    assert encoding.digest(given, dense.params) == before
    assert encoding.digest(encoding.decode(*encoding.encode(first))) == encoding.digest(first)
    assert encoding.digest(encoding.decode(*encoding.encode(given))) == encoding.digest(given)


def test_flops_follow_the_formula(dense, shared, personal):
    forward = 2 * (64 * 256 + 256 * 256 + 256 * 10)
    assert react(job(personal, Reprune()), shared, {}).flops == 3 * forward * 43 * PRUNER.steps
    tuned = react(job(personal, Reprune(tune_steps=7)), shared, {})
    small = candidate(dense, tuned).submodel.flops(dense.smap)
    assert tuned.flops == 3 * forward * 43 * PRUNER.steps + 3 * small * 43 * 7
    assert react(job(personal, Adapt(steps=9)), shared, {}).flops == 3 * personal.flops(dense.smap) * 43 * 9


def test_untuned_redeployment_ships_the_structures_the_client_lacks_and_the_mask(dense, shared, personal):
    outcome = react(job(personal, Reprune()), shared, {})
    new = candidate(dense, outcome).submodel
    missing = np.setdiff1d(new.indices(dense.smap), personal.indices(dense.smap))
    assert outcome.bytes_down == 4 * len(missing) + ceil(len(dense.smap) / 8) == lacking(personal, new, dense.smap)
    assert 0 < outcome.bytes_down < 4 * dense.layout.size


def test_tuned_redeployment_ships_every_kept_scalar_of_the_tensors_that_changed(dense, shared, personal):
    every = react(job(personal, Adapt()), shared, {})
    assert every.bytes_down == 4 * personal.parameters(dense.smap)
    head = react(job(personal, Adapt(part="head")), shared, {})
    kept_last = personal.kept[256:].sum()
    assert head.bytes_down == 4 * (10 * kept_last + 10)
    back = redeploy_bytes(dense, candidate(dense, head), Variant(personal))
    assert back == head.bytes_down


def test_the_upload_is_the_window(shared, personal):
    assert react(job(personal, Reprune(), targets=False), shared, {}).bytes_up == N * 64 * 4
    assert react(job(personal, Reprune()), shared, {}).bytes_up == N * (64 * 4 + 8)


def test_a_tuned_submodel_is_judged_and_adapted_with_its_own_weights(shared, personal):
    first = react(job(personal, Adapt(teacher="labels")), shared, {})
    second = react(job(personal, Adapt(teacher="labels"), weights=first.weights), shared, {})
    assert second.loss_stale == pytest.approx(first.loss_candidate)
    assert not np.array_equal(second.weights, first.weights)


def test_worth_it_needs_a_mean_gain_above_one_standard_error():
    rng = np.random.default_rng(0)
    stale = rng.normal(size=21)
    for shift, expected in ((1.5, True), (0.5, False), (-1.5, False)):
        noise = rng.normal(size=21)
        noise = (noise - noise.mean()) / noise.std(ddof=1) * np.sqrt(21)
        assert worth_it(stale, stale - shift - noise) is expected
    assert worth_it(stale, stale - 0.1)
    assert not worth_it(stale, stale)


def test_pure_noise_passes_the_gate_as_often_as_one_standard_error_allows():
    rng = np.random.default_rng(1)
    passed = sum(worth_it(rng.normal(size=21), rng.normal(size=21)) for _ in range(2000))
    assert stats.binomtest(passed, 2000, stats.t(20).sf(1)).pvalue > 0.001


def test_a_class_prior_shift_is_served_by_a_submodel_of_few_classes(dense, shared, personal):
    fleet = Fleet.sample(4, partition=IID(), seed=0)
    stream = Stream.of(TASK, fleet, Serving(drift=Drift(ClassPrior(keep=2), at=0)), 0)
    x, y = stream.draw(0, 0, 4)
    outcome = react(
        Job(client=0, action=Reprune(), level=1, inputs=x.reshape(-1, 64), targets=y.reshape(-1), kept=personal.kept), shared, {}
    )
    assert len(np.unique(y)) == 2
    assert outcome.loss_candidate < outcome.loss_stale


def test_windows_below_eight_and_missing_labels_are_refused(personal):
    with pytest.raises(ValueError, match="at least 8 examples, got 7 from client 3"):
        job(personal, Reprune(), num=7)
    for action in (Reprune(labels="true"), Adapt(teacher="labels")):
        with pytest.raises(ValueError, match="needs true labels"):
            job(personal, action, targets=False)


def test_the_smallest_window_still_works(shared, personal):
    assert np.isfinite(react(job(personal, Reprune(window=8), num=8), shared, {}).gain_error)


def test_a_non_finite_loss_names_the_client_and_the_tick(dense, shared, personal):
    broken = np.full(personal.parameters(dense.smap), np.nan, np.float32)
    with pytest.raises(DivergedError, match="client 3, round 17") as caught:
        react(job(personal, Reprune(), weights=broken, tick=17), shared, {})
    assert caught.value.client == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reprune(window=7), "window"),
        (lambda: Reprune(labels="none"), "labels"),
        (lambda: Reprune(mode="grow"), "mode"),
        (lambda: Reprune(tune_steps=-1), "tune_steps"),
        (lambda: Adapt(part="tail"), "part"),
        (lambda: Adapt(teacher="nobody"), "teacher"),
        (lambda: Adapt(steps=0), "steps"),
        (lambda: Adapt(lr=0.0), "lr"),
    ],
)
def test_bad_actions_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_reaction_judged_by_the_dense_model_reads_no_label(shared, personal):
    """With false labels, with none: the same outcome, and no label on the wire."""
    action = Reprune(gate="self")
    true, none = job(personal, action), job(personal, action, targets=False)
    false = Job(client=3, action=action, level=1, inputs=true.inputs, targets=(true.targets + 1) % 10, kept=personal.kept)
    outcomes = [react(j, shared, {}) for j in (true, none, false)]
    assert len({(o.accepted, o.loss_candidate, o.loss_stale) for o in outcomes}) == 1
    assert outcomes[1].bytes_up == none.inputs.nbytes
    labelled = [react(job(personal, Reprune(), seed=0), shared, {}), react(Job(client=3, action=Reprune(), level=1, inputs=true.inputs, targets=(true.targets + 1) % 10, kept=personal.kept), shared, {})]  # fmt: skip
    assert labelled[0].loss_candidate != labelled[1].loss_candidate, "the default gate does read them"
