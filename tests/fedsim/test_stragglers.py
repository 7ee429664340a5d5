"""Deadlines and dropout: hand cases, a simulation event by event, and rounds whose bytes, FLOPs and seconds are known."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import fedsim as fs
from fedsim.encoding import digest
from fedsim.rounds import Training
from fedsim.stragglers import Deadline, Dropout, done_by

TIMES = st.lists(st.floats(0.1, 20), min_size=1, max_size=8)


def test_the_first_three_within_the_deadline_are_kept():
    kept, ended = Deadline(seconds=5, over_select=1.3).select([1, 2, 3, 10], wanted=3)
    assert kept.tolist() == [True, True, True, False]
    assert ended == 3.0


def test_a_server_that_lacks_clients_waits_for_its_deadline():
    kept, ended = Deadline(seconds=2.5).select([1, 2, 3, 10], wanted=3)
    assert kept.tolist() == [True, True, False, False]
    assert ended == 2.5


def test_equal_times_go_by_client():
    assert Deadline(seconds=9).select([2, 1, 2, 2], wanted=2)[0].tolist() == [True, True, False, False]


@given(TIMES, st.integers(1, 8), st.floats(0.1, 20))
def test_a_deadline_selects_what_an_event_loop_does(times, wanted, limit):
    kept, ended = Deadline(seconds=limit).select(times, wanted)
    arrived, clock = [], None
    for t, client in sorted((t, c) for c, t in enumerate(times)):
        if t > limit:
            break
        arrived.append(client)
        if len(arrived) == min(wanted, len(times)):
            clock = t
            break
    assert np.flatnonzero(kept).tolist() == sorted(arrived)
    assert ended == (limit if clock is None else clock)


@given(st.floats(0, 30), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10))
def test_what_is_done_by_a_time_follows_in_order(seconds, down, compute, up):
    shares = [s[0] for s in done_by(seconds, *(np.array([v]) for v in (down, compute, up)))]
    spent = sum(s * v for s, v in zip(shares, (down, compute, up), strict=True))
    assert spent == pytest.approx(min(seconds, down + compute + up))
    assert all(later == 0 or earlier == 1 for earlier, later in pairwise(shares))


def test_clients_vanish_as_often_as_said_at_any_step():
    steps = Dropout(probability=0.3).steps(0, np.arange(20_000), 5, np.full(20_000, 10))
    assert (steps < 10).mean() == pytest.approx(0.3, abs=0.015)
    assert_allclose(np.bincount(steps[steps < 10], minlength=10) / 20_000, 0.03, atol=0.005)
    assert (Dropout(probability=0).steps(0, np.arange(9), 5, np.full(9, 10)) == 10).all()


def trained(*, rounds=2, num=12, communication=None, flops=None, strategy=None, **options):
    columns = dict.fromkeys(("memory", "up", "down"), np.full(num, 1e6)) | {"flops": np.full(num, 1e7) if flops is None else flops}
    training = Training.prepare(
        task=fs.tasks.Digits(hidden=(8,)),
        fleet=fs.Fleet.from_table(columns),
        strategy=strategy or fs.FedAvg(cohort=6, local_steps=10, batch_size=4, client_lr=0.1),
        communication=communication or fs.Uniform(),
        rounds=rounds,
        seed=0,
        executor=fs.SerialExecutor(),
        lanes=1,
        evaluate_every=rounds,
        **options,
    )
    state, records = training.init(), []
    while state.round < rounds:
        state, record = training.step(state)
        records.append(record)
    return training, state, records


def test_a_round_with_a_deadline_books_the_late_for_what_they_did_by_then():
    flops = np.where(np.arange(12) < 9, 1e7, 1e6)  # three clients compute ten times as long
    training, _, (record, _) = trained(
        flops=flops, strategy=fs.FedAvg(cohort=9, local_steps=10, batch_size=4), deadline=Deadline(seconds=1e9, over_select=4 / 3)
    )
    up, down, step = (column[0] for column in training.costs(np.array([0])))
    quick = down / 1e6 + 10 * step / 1e7 + up / 1e6
    assert record.seconds == pytest.approx(quick)
    late = record.clients["client"] >= 9
    assert_array_equal(record.clients["uploads"], ~late)
    done = (quick - down / 1e6) / (10 * step / 1e6)
    assert_allclose(record.clients["flops"][late], done * 10 * step)
    assert_allclose(record.clients["bytes_down"][late], down)
    assert_allclose(record.clients["bytes_up"][late], 0)
    assert record.wasted_flops == pytest.approx(3 * done * 10 * step)
    assert record.wasted_bytes == 3 * down
    assert np.isnan(record.clients["train_loss"][late]).all()
    assert "3 of 12 clients were too slow" in record.note


def test_a_round_that_nobody_ends_in_time_leaves_the_model_and_moves_the_clock():
    training, state, records = trained(deadline=Deadline(seconds=1e-6), rounds=3)
    assert_array_equal(state.params, training.init().params)
    assert state.clock == pytest.approx(3e-6)
    assert all("the round failed" in r.note and np.isnan(r.train_loss) and r.uploads == 0 for r in records)
    assert 0 < records[-1].test_accuracy < 1


def test_the_kept_alone_decide_the_model():
    flops = np.where(np.arange(12) < 6, 1e7, 1e5)
    strategy = fs.FedAvg(cohort=6, local_steps=10, batch_size=4, client_lr=0.1)
    _, raced, _ = trained(flops=flops, strategy=strategy, deadline=Deadline(seconds=1e9, over_select=2.0), rounds=1)
    _, alone, _ = trained(
        num=12, flops=flops, strategy=strategy, rounds=1, availability=fs.Trace(who=np.arange(6), start=np.zeros(6), end=np.full(6, 1e9))
    )
    assert_array_equal(raced.params, alone.params)


def test_those_that_vanish_lose_their_later_uploads_and_the_group_goes_on():
    training, _, records = trained(communication=fs.FedSGD(), dropout=Dropout(probability=0.5), rounds=4)
    up, down, step = (column[0] for column in training.costs(np.array([0])))
    assert any((r.clients["uploads"] < 10).any() for r in records)
    for r, record in enumerate(records):
        stays = Dropout(probability=0.5).steps(0, record.clients["client"], r, np.full(6, 10))
        vanished = stays < 10
        assert_array_equal(record.clients["uploads"], stays)
        assert_array_equal(record.clients["bytes_up"], stays * up)
        assert_array_equal(record.clients["bytes_down"], (stays + vanished) * down)
        assert_array_equal(record.clients["flops"], stays * step)
        assert record.wasted_bytes == vanished.sum() * down


def test_when_all_vanish_the_round_has_failed():
    training, state, records = trained(dropout=Dropout(probability=1.0), rounds=2)
    assert_array_equal(state.params, training.init().params)
    assert state.clock > 0
    assert all(r.wasted_flops == r.flops > 0 for r in records)


@pytest.mark.parametrize("options", [{"dropout": Dropout(probability=0.3)}, {"deadline": Deadline(seconds=0.05)}])
def test_units_of_any_size_give_the_same_records(options):
    communication = fs.FedSGD() if "dropout" in options else fs.Uniform()
    assert len({digest(*trained(communication=communication, unit_blocks=u, **options)[1:]) for u in (None, 1, 4)}) == 1


def test_a_deadline_needs_one_upload_a_round():
    with pytest.raises(ValueError, match="one upload a round"):
        trained(communication=fs.FedSGD(), deadline=Deadline(seconds=1))


def test_an_endless_deadline_takes_the_first_to_finish_but_cannot_wait_for_those_that_vanish():
    kept, ended = Deadline(seconds=np.inf).select([4.0, 1.0, 3.0], wanted=2)
    assert kept.tolist() == [False, True, True]
    assert ended == 3.0
    with pytest.raises(ValueError, match=r"deadline\.seconds a finite number"):
        trained(deadline=Deadline(seconds=np.inf), dropout=Dropout(probability=0.3))


@pytest.mark.parametrize(
    ("law", "match"),
    [
        (lambda: Deadline(seconds=0), "seconds"),
        (lambda: Deadline(seconds=1, over_select=0.5), "over_select"),
        (lambda: Deadline(seconds=1, min_clients=0), "min_clients"),
        (lambda: Dropout(probability=1.5), "probability"),
    ],
)
def test_bad_settings_are_refused_by_name(law, match):
    with pytest.raises(ValueError, match=match):
        law()
