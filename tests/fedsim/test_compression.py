"""Compressed uploads: the packed form is what arrives, bit for bit and byte for byte; laws of the literature; and whole rounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import fedsim as fs
from fedsim.communication.compression import ErrorFeedback, Quantised, Senders, Sign, TopK
from fedsim.encoding import digest
from fedsim.rounds import Training

EVERY = [
    Quantised(),
    Quantised(bits=2),
    Quantised(bits=5, stochastic=False),
    Sign(),
    TopK(share=0.1),
    TopK(share=0.6),
    TopK(share=0.05, values=Quantised(bits=8)),
    TopK(share=0.2, values=Sign()),
    ErrorFeedback(inner=TopK(share=0.1)),
    ErrorFeedback(inner=Sign()),
]


def senders(count, step=3):
    return Senders(np.arange(count), 0, np.ones(count, np.int64), step)


def rows(count, size, dtype=torch.float32, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(count, size)), dtype=dtype)


def arrive(rule, values, memory=None, step=3):
    memory = torch.zeros(len(values), rule.state_size(values.shape[1]), dtype=values.dtype) if memory is None else memory
    return rule.compress(values, memory, senders(len(values), step))


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize("size", [1, 7, 64, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_packed_form_arrives_as_said_in_the_bytes_said(rule, size, dtype):
    values = rows(3, size, dtype)
    received, _ = arrive(rule, values)
    for i in range(3):
        data = rule.encode(values[i : i + 1], Senders(np.array([i]), 0, np.ones(1, np.int64), 3))
        assert len(data) == rule.wire_bytes(size, dtype.itemsize)
        assert_array_equal(rule.decode(data, size, dtype)[0], received[i])


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_a_client_sends_the_same_in_any_company(rule):
    values = rows(6, 50)
    together, _ = arrive(rule, values)
    memory = torch.zeros(1, rule.state_size(50))
    for i in (5, 2):
        alone, _ = rule.compress(values[i : i + 1], memory, Senders(np.array([i]), 0, np.ones(1, np.int64), 3))
        assert_array_equal(alone[0], together[i])


def test_stochastic_rounding_is_right_on_average_and_within_a_step():
    values = rows(1, 40)
    draws = torch.stack([arrive(Quantised(bits=4), values, step=s)[0][0] for s in range(4000)])
    step = float(values.abs().max()) / 7
    assert (draws - values).abs().max() <= step * 1.0001
    assert_allclose(draws.mean(0), values[0], atol=5 * step / 2 / np.sqrt(4000))


def test_quantisations_variance_is_that_of_rounding_between_two_steps():
    values = rows(1, 40, torch.float64)
    scaled = values[0] / values.abs().max() * 7
    share = scaled - scaled.floor()
    expected = (share * (1 - share)) * (values.abs().max() / 7) ** 2
    draws = torch.stack([arrive(Quantised(bits=4), values, step=s)[0][0] for s in range(4000)])
    assert_allclose(draws.var(0), expected, rtol=0.3, atol=1e-6)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), st.floats(0.01, 1))
@settings(deadline=None)
def test_top_k_keeps_what_a_stable_sort_keeps_and_contracts(values, share):
    rule, x = TopK(share=share), torch.tensor([values], dtype=torch.float64)
    received, _ = arrive(rule, x)
    kept = np.argsort(-np.abs(values), kind="stable")[: rule.count(len(values))]
    expected = np.zeros(len(values))
    expected[kept] = np.array(values)[kept]
    assert_array_equal(received[0], expected)
    error, whole = float(((received - x) ** 2).sum()), float((x**2).sum())
    assert error <= (1 - rule.count(len(values)) / len(values)) * whole * (1 + 1e-12)


def test_an_index_costs_a_bitmap_or_packed_numbers_whichever_is_less():
    assert TopK(share=0.01).wire_bytes(1000, 4) == 10 * 4 + -(-10 * 10 // 8)
    assert TopK(share=0.5).wire_bytes(1000, 4) == 500 * 4 + 125
    assert TopK(share=0.01, values=Quantised(bits=8)).wire_bytes(1000, 4) == 10 + 4 + 13
    assert Sign().wire_bytes(1000, 4) == 125 + 4
    assert Quantised(bits=8).wire_bytes(1000, 4) == 1004


@pytest.mark.parametrize("inner", [Sign(), TopK(share=0.1), Quantised(bits=3)], ids=repr)
def test_with_feedback_nothing_is_lost_only_late(inner):
    rule, memory, sent, arrived = ErrorFeedback(inner=inner), torch.zeros(4, 30, dtype=torch.float64), 0.0, 0.0
    for step in range(50):
        values = rows(4, 30, torch.float64, seed=step)
        received, memory = rule.compress(values, memory, senders(4, step))
        sent, arrived = sent + values, arrived + received
    assert_allclose(arrived + memory, sent, atol=1e-12)
    assert memory.abs().max() < 20


def test_signs_alone_stall_where_feedback_goes_on():
    """On f(x) = |x1 + x2| e + |x1 - x2| signs of the subgradient never change x1 + x2 (arXiv:1901.09847, section 3)."""
    lean = 0.5

    def descend(rule):
        x, memory = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.zeros(1, rule.state_size(2), dtype=torch.float64)
        for t in range(4000):
            total, apart = float(x.sum().sign()), 1.0 if x[0, 0] >= x[0, 1] else -1.0
            gradient = torch.tensor([[lean * total + apart, lean * total - apart]], dtype=torch.float64)
            rate = 0.3 / np.sqrt(1 + t)
            received, memory = rule.compress(rate * gradient, memory, senders(1, t))
            x = x - received
        return float(lean * (x[0, 0] + x[0, 1]).abs() + (x[0, 0] - x[0, 1]).abs())

    assert descend(Sign()) > 0.9
    assert descend(ErrorFeedback(inner=Sign())) < 0.05


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_passes_as_it_is(rule, bad):
    values = rows(3, 20)
    values[1, 4] = bad
    received, _ = arrive(rule, values)
    assert not received[1].isfinite().all()
    assert received[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_zeros_stay_zeros(rule):
    assert_array_equal(arrive(rule, torch.zeros(2, 9))[0], np.zeros((2, 9)))


@pytest.mark.parametrize(
    ("make", "match"), [(lambda: Quantised(bits=1), "bits"), (lambda: TopK(share=0), "share"), (lambda: TopK(share=1.5), "share")]
)
def test_bad_settings_are_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---------------------------------------------------------------- in rounds


def trained(compression, *, communication=None, rounds=3, lanes=1, cls=fs.FedAvg, **options):
    training = Training.prepare(
        task=fs.tasks.Digits(hidden=(16,)),
        fleet=fs.Fleet.sample(10, partition=fs.LabelShards(2), seed=0),
        strategy=cls(cohort=6, local_steps=8, batch_size=8, client_lr=0.1, compression=compression),
        communication=communication or fs.Uniform(),
        rounds=rounds,
        seed=0,
        executor=fs.SerialExecutor(),
        evaluate_every=rounds,
        lanes=lanes,
        **options,
    )
    state, records = training.init(), []
    while state.round < rounds:
        state, record = training.step(state)
        records.append(record)
    return training, state, records


def test_bytes_up_are_those_of_the_packed_form_and_the_sample_count():
    training, _, (record, *_) = trained(TopK(share=0.1))
    size = training.layout.size
    assert_array_equal(record.clients["bytes_up"], TopK(share=0.1).wire_bytes(size, 4) + 8)
    assert_array_equal(record.clients["bytes_down"], 4 * size)
    assert trained(Quantised(), cls=fs.Scaffold)[2][0].clients["bytes_up"][0] == Quantised().wire_bytes(2 * size, 4) + 8


def test_everything_kept_is_no_compression():
    assert_allclose(trained(TopK(share=1.0))[1].params, trained(None)[1].params, rtol=0, atol=1e-6)


def test_feedback_is_kept_by_clients_over_rounds():
    """What the server holds after a round is the mean of what arrived: redone here from the clients' own memories."""
    rule = ErrorFeedback(inner=TopK(share=0.05))
    training, state, _ = trained(rule, rounds=1)
    clients = training.draw(0, 0.0)[0]
    kept = training.log.read(state.clients, clients)
    plain = trained(None, rounds=1)[1].params
    weights = training.shards.sizes[clients] / training.shards.sizes[clients].sum()
    assert_allclose(state.params + weights @ kept, plain, atol=1e-6)
    others = np.setdiff1d(np.arange(10), clients)
    assert not training.log.read(state.clients, others).any()


@pytest.mark.parametrize(
    "communication", [fs.Uniform(), fs.FedSGD(), fs.DynamicFL(high=2, budget=0.5)], ids=["once", "every step", "mixed"]
)
def test_units_and_chains_of_any_size_give_the_same_records(communication):
    rule = ErrorFeedback(inner=TopK(share=0.1, values=Quantised(bits=4)))
    seen = set()
    for unit_blocks in (None, 1, 4):
        training, state, records = trained(rule, communication=communication, unit_blocks=unit_blocks, rounds=2)
        seen.add(digest(state, records, training.log.read(state.clients, np.arange(10))))
    assert len(seen) == 1


def test_lanes_and_the_loop_agree():
    rule = ErrorFeedback(inner=Sign())
    assert_allclose(trained(rule, lanes=8)[1].params, trained(rule, lanes=1)[1].params, atol=2e-4)
