import numpy as np
import pytest

import fedsim as fs
from detection import CUSUM, NormalScores, RobustScoreCUSUM
from detection.evaluation import average_run_length
from fedsim import encoding


def losses(rng, clients, ticks, *, shift=0.0):
    """Log-normal losses whose scale differs from client to client."""
    centre = np.linspace(-2.0, 1.0, clients)[:, None]
    return np.exp(centre + 0.3 * (rng.standard_normal((clients, ticks)) + shift))


def watch(monitoring, stream, state=None, active=None):
    state = state or monitoring.init(len(stream))
    first = np.full(len(stream), -1)
    everyone = np.ones(len(stream), bool)
    for tick in range(stream.shape[1]):
        state, alarms = monitoring.step(state, stream[:, tick], everyone if active is None else active[:, tick])
        first[alarms & (first < 0)] = tick
    return state, first


def test_nobody_alarms_while_its_law_is_learnt_and_all_changed_clients_do_afterwards():
    rng, monitoring = np.random.default_rng(0), fs.Monitoring(arl=1_000, calibration=50)
    state, first = watch(monitoring, losses(rng, 40, 50, shift=5.0))
    assert (first < 0).all()
    assert (state.needed == 0).all()
    _, first = watch(monitoring, losses(rng, 40, 60, shift=8.0), state)
    assert (first >= 0).all()


def test_false_alarms_are_as_rare_as_promised_on_streams_whose_law_was_learnt_from_little():
    """The mean time between false alarms, with alarms as renewals, is at least what was asked for."""
    rng, monitoring = np.random.default_rng(1), fs.Monitoring(arl=500, calibration=30, recalibration=30)
    state, _ = watch(monitoring, losses(rng, 400, 30))
    lengths = []
    stream = losses(rng, 400, 400)
    since = np.zeros(400, int)
    for tick in range(400):
        state, alarms = monitoring.step(state, stream[:, tick], np.ones(400, bool))
        lengths += [(tick + 1 - since[c], False) for c in np.flatnonzero(alarms)]
        since[alarms] = tick + 1
        state = monitoring.restart(state, alarms)
    lengths += [(400 - s, True) for s in since if s < 400]
    ticks, censored = map(np.array, zip(*lengths, strict=True))
    assert average_run_length(ticks, censored) > 500


def test_a_relearnt_client_is_quiet_for_its_new_calibration_and_others_keep_their_bits():
    rng, monitoring = np.random.default_rng(2), fs.Monitoring(arl=1_000, calibration=40, recalibration=20)
    state, _ = watch(monitoring, losses(rng, 10, 60))
    changed = np.arange(10) == 3
    after = monitoring.relearn(state, changed)
    np.testing.assert_array_equal(after.detector.statistic[~changed], state.detector.statistic[~changed])
    assert after.detector.statistic[3] == 0
    after, first = watch(monitoring, np.exp(rng.standard_normal((10, 20)) * 0.3 + 3), after)
    assert first[3] == -1
    assert after.needed[3] == 0
    np.testing.assert_array_equal(np.delete(after.scores.location, 3), np.delete(state.scores.location, 3))
    assert after.scores.location[3] > state.scores.location[3] + 1


def test_clients_that_are_rarely_active_get_their_law_later_and_do_not_hold_up_the_fleet():
    rng, monitoring = np.random.default_rng(3), fs.Monitoring(arl=1_000, calibration=20, recalibration=20)
    active = np.ones((30, 45), bool)
    active[0] = np.arange(45) % 2 == 0
    state, _ = watch(monitoring, losses(rng, 30, 30), active=active[:, :30])
    assert (state.needed[1:] == 0).all()
    assert state.needed[0] == 20
    state, _ = watch(monitoring, losses(rng, 30, 15), state, active[:, 30:])
    assert (state.needed == 0).all()


def test_a_broken_model_alarms():
    rng, monitoring = np.random.default_rng(4), fs.Monitoring(arl=1_000, calibration=50)
    state, _ = watch(monitoring, losses(rng, 5, 50))
    _, first = watch(monitoring, np.full((5, 60), np.inf), state)
    assert (first >= 0).all()


def test_the_estimated_change_is_near_the_true_one():
    rng, monitoring = np.random.default_rng(5), fs.Monitoring(arl=10_000, calibration=100, recalibration=100)
    state, _ = watch(monitoring, losses(rng, 200, 150))
    errors = []
    for _ in range(150, 200):
        state, alarms = monitoring.step(state, losses(rng, 200, 1, shift=2.0)[:, 0], np.ones(200, bool))
        errors += (monitoring.changed_at(state)[alarms] - 150).tolist()
        state = monitoring.restart(state, alarms)
    assert abs(np.median(errors[:200])) <= 2


def test_other_detectors_take_the_same_place():
    assert isinstance(fs.Monitoring(CUSUM).fitted, CUSUM)
    assert isinstance(fs.Monitoring().fitted, RobustScoreCUSUM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detector": 3}, "detector must be a class of reflected sums"),
        ({"arl": 1.0}, "arl must be at least 2 ticks, got 1.0"),
        ({"calibration": 5}, "at least 10 ticks"),
        ({"recalibration": 200}, "recalibration at most calibration"),
        ({"confidence": 1.5}, "0 < confidence < 1"),
    ],
)
def test_fields_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fs.Monitoring(**options)


def test_a_shift_that_calibration_cannot_tell_is_refused():
    with pytest.raises(ValueError, match="harm must exceed every pre-change mean"):
        _ = fs.Monitoring(shift=0.2, recalibration=20).fitted


def test_an_infinite_loss_alarms_while_the_law_is_still_learnt_and_is_not_learnt():
    monitoring = fs.Monitoring(calibration=10, recalibration=10)
    state, losses = monitoring.init(3), np.array([0.5, 0.6, 0.7])
    rng = np.random.default_rng(0)
    for tick in range(12):
        noisy = losses * rng.lognormal(0, 0.3, 3)
        noisy[1] = np.inf if tick == 4 else noisy[1]
        state, alarms = monitoring.step(state, noisy, np.ones(3, bool))
        assert alarms.tolist() == [False, tick == 4, False]
    assert monitoring.watched(state).all()
    with pytest.raises(ValueError, match="client 2 at tick 12 is nan"):
        monitoring.step(state, np.array([0.5, 0.6, np.nan]), np.ones(3, bool))


def test_laws_are_those_of_the_losses_each_client_showed_while_it_learnt():
    """Against a plain loop that keeps every client's losses in a list, with clients that are inactive, broken, or start anew."""
    rng, monitoring, num = np.random.default_rng(6), fs.Monitoring(arl=1_000, calibration=30, recalibration=20), 25
    state, shown, fitted = monitoring.init(num), [[] for _ in range(num)], None
    for tick in range(140):
        active, values = rng.random(num) < 0.9, losses(rng, num, 1)[:, 0]
        values[tick % num] = np.inf if tick % 9 == 0 else values[tick % num]
        learning = active & np.isfinite(values) & (np.array([len(s) for s in shown]) < state.needed)
        for client in np.flatnonzero(learning):
            shown[client].append(values[client])
        wanted = state.needed
        state, _ = monitoring.step(state, values, active)
        done = (state.needed == 0) & (wanted > 0)
        if done.any():
            table = np.zeros((num, 30))
            for client in range(num):
                table[client, : len(shown[client])] = shown[client]
            there = np.arange(30) < np.array([[len(s)] for s in shown])
            if fitted is None:
                fitted = NormalScores(clip=4.0).fit(table, there)
            else:
                width = max(len(shown[c]) for c in np.flatnonzero(done))
                fitted = fitted.refit(done, table[done, :width], there[done, :width])
            for client in np.flatnonzero(done):
                np.testing.assert_allclose(state.reference[client], np.mean(shown[client]))
                shown[client] = []
        if fitted is not None:
            np.testing.assert_array_equal(state.scores.location, fitted.location)
            np.testing.assert_array_equal(state.scores.deviation, fitted.deviation)
        if tick > 50 and tick % 10 == 0:
            changed = rng.random(num) < 0.3
            shown = [[] if c else s for c, s in zip(changed, shown, strict=True)]
            state = monitoring.relearn(state, changed)
    assert fitted is not None
    assert sum(len(taken.clients) for taken in state.taken) == sum(map(len, shown))


def test_a_state_with_clients_that_learn_survives_encoding():
    rng, monitoring = np.random.default_rng(7), fs.Monitoring(calibration=20, recalibration=20)
    state, _ = watch(monitoring, losses(rng, 10, 12))
    back = encoding.decode(*encoding.encode(state), trusted=("fedsim", "detection"))
    stream = losses(rng, 10, 20)
    (one, first), (two, again) = watch(monitoring, stream, state), watch(monitoring, stream, back)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(one.scores.location, two.scores.location)
