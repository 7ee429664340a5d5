"""Streams: determinism tick by tick, the sampling law, drift in place."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from fedsim import encoding
from fedsim.drift import (
    At,
    ClassPrior,
    Clients,
    Contrast,
    DomainSwitch,
    Drift,
    GaussianBlur,
    GaussianNoise,
    Gradual,
    Incremental,
    Invert,
    LabelNoise,
    LabelSwap,
    Rotation,
)
from fedsim.fleet import Fleet
from fedsim.partition import IID, ByKey, Dirichlet
from fedsim.stream import All, Bernoulli, Laws, Sampled, Serving, Stream
from fedsim.tasks import Dataset, Digits

TASK = Digits(domains=("upright", "rotated", "inverted"))
ALL_DRIFTS = (
    Drift(DomainSwitch(), at=20, clients=0.5),
    Drift(GaussianNoise(0.3), at=10, onset=Gradual(20)),
    Drift(LabelSwap(cycle=3), at=15, clients=0.3),
    Drift(ClassPrior(keep=3), at=5, clients=0.3, onset=Gradual(10)),
)


def fleet_of(partition, num=12):
    return Fleet.sample(num, partition=partition, seed=0)


def stream_of(partition, *drifts, num=12, batch=16, ticks=500, seed=0, task=TASK):
    return Stream.of(task, fleet_of(partition, num), Serving(ticks=ticks, batch=batch, drift=drifts), seed)


def toy(num=60):
    """One number an example: its row, so draws can be read off."""
    rows = np.arange(num)
    return Dataset(rows[:, None].astype(np.float32), rows % 5, {"domain": rows // (num // 3)})


def test_draws_in_windows_equal_draws_tick_by_tick():
    stream = stream_of(Dirichlet(alpha=0.3, by="domain"), *ALL_DRIFTS)
    for client in range(12):
        inputs, targets = stream.draw(client, 0, 40)
        assert (inputs.shape, targets.shape) == ((40, 16, 64), (40, 16))
        for first, num in ((0, 7), (7, 20), (33, 7)):
            x, y = stream.draw(client, first, num)
            assert_array_equal(x, inputs[first : first + num])
            assert_array_equal(y, targets[first : first + num])
        scattered = [39, 3, 17]
        assert_array_equal(stream.draw_at(client, scattered)[0], inputs[scattered])


def test_draws_depend_on_seed_client_and_tick_and_on_nothing_else():
    first, again = (stream_of(Dirichlet(alpha=0.3, by="domain"), *ALL_DRIFTS) for _ in range(2))
    again.draw(5, 0, 3)
    assert_array_equal(first.draw(2, 0, 30)[0], again.draw(2, 0, 30)[0])
    x = first.draw(2, 0, 2)[0]
    assert not np.array_equal(x[0], x[1])
    assert not np.array_equal(x, first.draw(3, 0, 2)[0])
    assert not np.array_equal(x, stream_of(Dirichlet(alpha=0.3, by="domain"), *ALL_DRIFTS, seed=1).draw(2, 0, 2)[0])


def test_a_stream_before_its_change_point_is_the_stream_without_drift():
    quiet, drifting = stream_of(IID()), stream_of(IID(), Drift(Invert(), at=10), Drift(DomainSwitch("rotated"), at=10))
    assert_array_equal(quiet.draw(0, 0, 10)[0], drifting.draw(0, 0, 10)[0])
    assert not np.array_equal(quiet.draw(0, 10, 1)[0], drifting.draw(0, 10, 1)[0])


def test_the_law_draws_values_by_the_client_s_shares_and_uniformly_inside_them():
    data = toy()
    shares = np.array([[6.0, 3.0, 1.0], [0.0, 1.0, 1.0]])
    stream = Stream(dataset=data, laws=Laws(key="domain", values=np.arange(3), shares=shares), batch=50, seed=0)
    for client in (0, 1):
        rows = stream.draw(client, 0, 400)[0].astype(int).ravel()
        expected = np.repeat(shares[client] / shares[client].sum() / 20, 20) * len(rows)
        counts = np.bincount(rows, minlength=60)
        assert not counts[expected == 0].any()
        assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.001


def test_an_iid_fleet_draws_the_whole_test_set_uniformly():
    stream = stream_of(IID(), task=Digits())
    test = Digits().data().test
    rows = {row.tobytes(): i for i, row in enumerate(test.inputs)}
    drawn = [rows[x.tobytes()] for x in stream.draw(0, 0, 1000)[0].reshape(-1, 64)]
    counts = np.bincount(drawn, minlength=len(test))
    assert stats.chisquare(counts).pvalue > 0.001


def test_laws_count_the_key_s_values_in_each_training_shard():
    fleet = fleet_of(Dirichlet(alpha=0.3, by="domain"))
    train, test = TASK.data()
    shards = fleet.shards(train)
    laws = Laws.of("domain", shards, train, test)
    for client in range(12):
        own = train.keys["domain"][shards.shard(client)]
        assert_array_equal(laws.shares[client], np.bincount(own, minlength=3))


def test_inputs_and_targets_stay_together():
    task = Digits()
    test = task.data().test
    label = {row.tobytes(): int(y) for row, y in zip(test.inputs, test.targets, strict=True)}
    x, y = stream_of(Dirichlet(alpha=0.3), task=task).draw(1, 0, 20)
    assert [label[row.tobytes()] for row in x.reshape(-1, 64)] == y.ravel().tolist()


def test_domain_switch_changes_the_domain_served_from_its_tick_on():
    data = toy()
    fleet = fleet_of(IID(), 2)
    switch = Drift(DomainSwitch(2), at=30, clients=Clients((1,))).schedule(fleet, 100, 0)
    laws = Laws(key="domain", values=np.arange(3), shares=np.array([[1.0, 0, 0], [1.0, 0, 0]]))
    stream = Stream(dataset=data, laws=laws, schedules=(switch,), batch=16, seed=0)
    domain = stream.draw(1, 0, 60)[0][..., 0] // 20
    assert (domain[:30] == 0).all()
    assert (domain[30:] == 2).all()
    assert (stream.draw(0, 0, 60)[0] // 20 == 0).all()
    assert_array_equal(stream.change_points, [-1, 30])


def test_gradual_switch_draws_the_stated_share_from_the_new_law():
    data, width = toy(), 20
    fleet = fleet_of(IID(), 1)
    switch = Drift(DomainSwitch(2), at=30, onset=Gradual(width)).schedule(fleet, 100, 0)
    laws = Laws(key="domain", values=np.arange(3), shares=np.array([[1.0, 0, 0]]))
    stream = Stream(dataset=data, laws=laws, schedules=(switch,), batch=500, seed=0)
    new = (stream.draw(0, 30, width)[0][..., 0] // 20 == 2).sum(1)
    assert all(stats.binomtest(int(n), 500, (i + 1) / width).pvalue > 1e-4 for i, n in enumerate(new))


def test_label_swap_keeps_the_inputs_of_the_undrifted_stream():
    plain, swapped = stream_of(Dirichlet(alpha=1.0)), stream_of(Dirichlet(alpha=1.0), Drift(LabelSwap(cycle=10), at=0))
    assert_array_equal(plain.draw(3, 0, 20)[0], swapped.draw(3, 0, 20)[0])
    assert_array_equal((plain.draw(3, 0, 20)[1] + 1) % 10, swapped.draw(3, 0, 20)[1])


def test_several_drifts_apply_in_the_order_of_their_starts():
    swap, cycle = LabelSwap(pairs=((0, 1),)), LabelSwap(cycle=3)
    plain = stream_of(IID()).draw(0, 20, 20)[1]
    drifted = stream_of(IID(), Drift(cycle, at=10), Drift(swap, at=5)).draw(0, 20, 20)[1]
    swapped = np.where(plain < 2, 1 - plain, plain)
    assert_array_equal(drifted, np.where(swapped < 3, (swapped + 1) % 3, swapped))


def test_several_changes_of_the_law_compose():
    stream = stream_of(Dirichlet(alpha=0.5, by="domain"), Drift(DomainSwitch("inverted"), at=0), Drift(ClassPrior(keep=2), at=30))
    law = stream.law(4, (0, 1))
    assert_allclose(stream.cells.by_domain(law), [0, 0, 1])
    assert (stream.cells.by_label(law) > 0).sum() == 2
    assert len(np.unique(stream.draw(4, 30, 40)[1])) == 2
    assert len(np.unique(stream.draw(4, 0, 30)[1])) == 10


def test_change_points_count_only_drifts_that_make_a_difference():
    stream = stream_of(ByKey("domain"), Drift(DomainSwitch("upright"), at=7), Drift(Rotation(0), at=3), Drift(Invert(), at=50), num=3)
    assert_array_equal(stream.changes, [[-1, -1, 50], [7, -1, 50], [7, -1, 50]])
    assert_array_equal(stream.change_points, [50, 7, 7])
    assert_array_equal(stream_of(IID()).change_points, -1)


def test_activity_is_exact_and_a_function_of_seed_and_tick():
    for activity, expected in ((All(), 50), (Sampled(20), 20)):
        serving = Serving(activity=activity)
        assert all(serving.active(t, 50, 0).sum() == expected for t in range(30))
        assert_array_equal(serving.active(3, 50, 0), serving.active(3, 50, 0))
    flags = np.array([Serving(activity=Bernoulli(0.3)).active(t, 200, 1) for t in range(100)])
    assert stats.binomtest(int(flags.sum()), flags.size, 0.3).pvalue > 0.001
    assert not np.array_equal(flags[0], flags[1])
    sampled = sum(Serving(activity=Sampled(20)).active(t, 50, 0) for t in range(500))
    assert abs(sampled - 200).max() < 6 * np.sqrt(500 * 0.4 * 0.6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ticks": 0}, "ticks"),
        ({"batch": 0}, "batch"),
        ({"batch": 1.5}, "batch"),
        ({"drift": (3,)}, "drift must be a Drift"),
        ({"labels": "sometimes"}, "labels"),
        ({"activity": 0.5}, "activity"),
    ],
)
def test_bad_serving_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Serving(**fields)


def test_data_that_cannot_be_served_are_refused_before_any_draw():
    with pytest.raises(ValueError, match="at least 2 values"):
        stream_of(IID(), Drift(DomainSwitch(), at=3), task=Digits())
    with pytest.warns(UserWarning, match="hold no examples"), pytest.raises(ValueError, match="holds no training example"):
        stream_of(Dirichlet(alpha=0.01, minimum=0), num=60)
    train, test = toy(), Dataset(np.zeros((4, 1), np.float32), np.zeros(4, int), {"domain": np.zeros(4, int)})
    with pytest.raises(ValueError, match="that the test split lacks"):
        Laws.of("domain", fleet_of(ByKey("domain"), 3).shards(train), train, test)
    with pytest.raises(ValueError, match="20 active clients, but the fleet has 5"):
        Serving(activity=Sampled(20)).active(0, 5, 0)


def test_serving_survives_encoding():
    serving = Serving(ticks=9, drift=Drift(DomainSwitch(), start=At(2), clients=0.3), activity=Sampled(3))
    assert encoding.decode(*encoding.encode(serving)) == serving
    assert serving == Serving(ticks=9, drift=(Drift(DomainSwitch(), at=2, clients=0.3),), activity=Sampled(3))


@pytest.mark.parametrize("partition", [IID(), Dirichlet(alpha=0.3, by="domain"), ByKey("domain")], ids=repr)
@pytest.mark.parametrize("batch", [1, 5])
def test_draws_of_many_clients_are_those_of_each_alone(partition, batch):
    pictures = [Drift(c, at=8, clients=0.5, onset=Gradual(6)) for c in (Rotation(30), Invert(), GaussianBlur(0.8), Contrast(0.5))]
    stream = stream_of(partition, *ALL_DRIFTS, Drift(LabelNoise(0.5), at=3, onset=Incremental(9)), *pictures, batch=batch)
    clients, ticks = np.array([4, 11, 0, 7, 3]), np.array([3, 30, 9, 12])
    inputs, targets = stream.draw_many(clients, ticks)
    for row, client in enumerate(clients):
        alone = stream.draw_at(int(client), ticks)
        assert_array_equal(inputs[row], alone[0])
        assert_array_equal(targets[row], alone[1])
    assert not np.array_equal(inputs[0], inputs[1])


def test_changes_of_clients_alike_are_found_once_and_are_each_client_s_own():
    drifts = (Drift(LabelSwap(pairs=((0, 1),)), at=9, clients=0.7), Drift(Rotation(0), at=2), Drift(Invert(), at=4, clients=0.5))
    stream = stream_of(Dirichlet(alpha=0.02), *drifts, num=40)
    changes = [s.drift.change for s in stream.schedules]
    for client in range(40):
        law = stream.law(client)
        for j, schedule in enumerate(stream.schedules):
            hit = schedule.nu[client] >= 0 and changes[j].alters(law, stream.cells, np.random.default_rng(0))
            assert stream.changes[client, j] == (schedule.nu[client] if hit else -1)
    assert (stream.changes[:, 1] == -1).all()
    assert len(np.unique(stream.changes[:, 0])) == 2
