"""Laws that every detector obeys: its state is a value, its streams do not interact, and what it is given is checked."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from detection import CUSUM, Gaussian, GaussianBox, RobustScoreCUSUM, ScoreCUSUM, Singleton, likelihood_increment, score_increment
from detection.bank import Bank, Mirrored, TwoSided
from detection.detector import Detector
from detection.e_power import AdjustedEProcess
from detection.e_processes import EProcess
from detection.focus import FOCuS
from detection.glr import MeanVarianceGLR, WindowGLR
from detection.matrix_multiplier import MatrixIncrement, MatrixScoreCUSUM, RobustMatrixScoreCUSUM
from detection.page_hinkley import PageHinkley
from detection.scan_b import ScanB
from detection.self_starting import SelfStarted, SelfStarting
from detection.shiryaev_roberts import ShiryaevRoberts
from detection.states import columns, from_bytes, take, to_bytes

NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
PLANE = Gaussian([0.0, 0.0], [[1.0, 0.4], [0.4, 2.0]]), Gaussian([1.0, 0.5], [[1.5, 0.0], [0.0, 2.0]])
STREAMS, TICKS = 9, 40


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A detector with observations of ``dimension`` numbers (0: a plain number), the first ``warm`` of which only teach."""

    detector: Detector
    dimension: int = 0
    warm: int = 0


def plane_cusum():
    return CUSUM(pre=PLANE[0], post=PLANE[1], threshold=4.0)


def robust(clip):
    pre = GaussianBox(mean=(-0.1, 0.1), variance=(0.9, 1.1))
    return RobustScoreCUSUM.fit(pre=pre, post=GaussianBox(mean=(0.8, 2.0), variance=(0.9, 1.1)), arl=200.0, clip=clip)


def matrix_cusum(kind):
    design = MatrixIncrement(pre=PLANE[0], post=PLANE[1], matrix=((1.2, 0.3), (0.3, 1.9)), offset=-0.1)
    return kind(pre=Singleton(PLANE[0]), post=Singleton(PLANE[1]), design=design, multiplier=0.9, threshold=4.0)


PROCESS = EProcess.at_level(0.05, increment=likelihood_increment(NULL, SHIFTED, 4.0))
REFERENCE = np.random.default_rng(99).standard_normal((3, 6, 2))
SETTINGS = {
    "CUSUM": Setting(detector=CUSUM(pre=NULL, post=SHIFTED, threshold=4.0)),
    "CUSUM of vectors": Setting(detector=plane_cusum(), dimension=2),
    "ScoreCUSUM": Setting(detector=ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(SHIFTED), arl=200.0)),
    "ScoreCUSUM of a variance": Setting(
        detector=ScoreCUSUM.fit(pre=Singleton(NULL), post=Singleton(Gaussian(0.0, 2.0)), arl=200.0, clip=None)
    ),
    "RobustScoreCUSUM": Setting(detector=robust(4.0)),
    "RobustScoreCUSUM unclipped": Setting(detector=robust(None)),
    "MatrixScoreCUSUM": Setting(detector=matrix_cusum(MatrixScoreCUSUM), dimension=2),
    "RobustMatrixScoreCUSUM": Setting(detector=matrix_cusum(RobustMatrixScoreCUSUM), dimension=2),
    "EProcess": Setting(detector=PROCESS),
    "AdjustedEProcess": Setting(detector=AdjustedEProcess(process=PROCESS, threshold=3.0)),
    "SelfStarted": Setting(
        detector=SelfStarted.around(CUSUM(pre=NULL, post=SHIFTED, threshold=4.0, clip=4.0), SelfStarting(warm=5)), warm=5
    ),
    "ShiryaevRoberts": Setting(detector=ShiryaevRoberts(increment=likelihood_increment(NULL, SHIFTED), threshold=5.0)),
    "ShiryaevRoberts with a head start": Setting(
        detector=ShiryaevRoberts(increment=score_increment(NULL, Gaussian(0.5, 2.0), 3.0).scaled(0.3), threshold=5.0, head_start=20.0)
    ),
    "ShiryaevRoberts of vectors": Setting(
        detector=ShiryaevRoberts(increment=likelihood_increment(*PLANE), threshold=5.0), dimension=2
    ),
    "WindowGLR": Setting(detector=WindowGLR(threshold=5.0, window=20)),
    "WindowGLR of some sizes": Setting(detector=WindowGLR(threshold=5.0, window=3, side="both", sizes=(0.5, 2.0))),
    "MeanVarianceGLR": Setting(detector=MeanVarianceGLR(threshold=8.0, window=20)),
    "MeanVarianceGLR of pairs": Setting(detector=MeanVarianceGLR(threshold=8.0, window=7, shortest=2)),
    "FOCuS": Setting(detector=FOCuS(threshold=5.0)),
    "FOCuS of an unknown mean": Setting(detector=FOCuS(threshold=5.0, mean=None, side="both")),
    "PageHinkley": Setting(detector=PageHinkley(threshold=8.0)),
    "PageHinkley that forgets": Setting(detector=PageHinkley(threshold=3.0, alpha=0.9, min_instances=1, side="down")),
    "ScanB": Setting(detector=ScanB(reference=REFERENCE[..., :1], bandwidth=1.0, deviation=0.1, threshold=3.0)),
    "ScanB of vectors": Setting(detector=ScanB(reference=REFERENCE, bandwidth=0.7, deviation=0.1, threshold=3.0), dimension=2),
    "Bank": Setting(detector=Bank.of_shifts()),
    "Bank of unlike members": Setting(
        detector=Bank(members=(FOCuS(threshold=5.0), Bank.of_shifts(clip=3.0), ShiryaevRoberts(
            increment=likelihood_increment(NULL, SHIFTED), threshold=5.0)), threshold=5.0)
    ),
    "Mirrored": Setting(detector=Mirrored(detector=WindowGLR(threshold=5.0, window=20), threshold=5.0)),
    "TwoSided": Setting(detector=TwoSided(CUSUM(pre=NULL, post=SHIFTED, threshold=4.0), threshold=4.0)),
    "TwoSided of vectors": Setting(detector=TwoSided(plane_cusum(), threshold=4.0), dimension=2),
}  # fmt: skip
every = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def observations(setting, seed=0):
    """Streams (TICKS, STREAMS[, d]) of which the first rises steadily, some jump, and some are quiet."""
    rng = np.random.default_rng(seed)
    shape = (TICKS, STREAMS, setting.dimension) if setting.dimension else (TICKS, STREAMS)
    x = np.moveaxis(rng.standard_normal(shape), 1, -1)
    x[20:, ..., 1:4] += np.array([2.0, -2.0, 1.0])
    x[..., 0] = np.linspace(0.0, 3.0, TICKS).reshape((TICKS,) + (1,) * (x.ndim - 2))
    return np.moveaxis(x, -1, 1)


def fed(detector, state, x):
    for column in x:
        state = detector.step(state, column)
    return state


def verdict(detector, state):
    return detector.statistic(state), detector.changed_at(state), detector.alarms(state)


def assert_same_verdict(detector, state, expected):
    for found, wanted in zip(verdict(detector, state), expected, strict=True):
        assert_array_equal(found.view(np.uint8), np.ascontiguousarray(wanted).view(np.uint8))  # every bit, the sign of 0 included


def assert_same_rows(state, other, rows):
    """Equal bits of ``rows`` in every array, but for those with more slots in one of the states."""
    for (name, first), (_, second) in zip(columns(state), columns(other), strict=True):
        if first.shape == second.shape:
            assert first[rows].tobytes() == second[rows].tobytes(), name


@every
def test_a_batch_is_bit_for_bit_its_streams_one_by_one(setting):
    detector, x = setting.detector, observations(setting)
    together, alone = detector.init(STREAMS), [detector.init(1) for _ in range(STREAMS)]
    for column in x:
        together = detector.step(together, column)
        alone = [detector.step(state, column[row : row + 1]) for row, state in enumerate(alone)]
        verdicts = [verdict(detector, state) for state in alone]
        assert_same_verdict(detector, together, [np.concatenate(parts) for parts in zip(*verdicts, strict=True)])


@every
def test_streams_in_another_order_give_their_results_in_that_order(setting):
    detector, x, order = setting.detector, observations(setting), np.random.default_rng(1).permutation(STREAMS)
    state = fed(detector, detector.init(STREAMS), x)
    assert_same_verdict(detector, fed(detector, detector.init(STREAMS), x[:, order]), [part[order] for part in verdict(detector, state)])


@every
def test_some_streams_can_be_taken_out_and_continued(setting):
    detector, x, rows = setting.detector, observations(setting), np.array([7, 0, 3])
    state = fed(detector, detector.init(STREAMS), x[:20])
    some, state = fed(detector, take(state, rows), x[20:, rows]), fed(detector, state, x[20:])
    assert_same_verdict(detector, some, [part[rows] for part in verdict(detector, state)])


@every
def test_a_step_leaves_the_state_and_the_observations_it_was_given_as_they_were(setting):
    detector, x = setting.detector, observations(setting)
    state, mask = fed(detector, detector.init(STREAMS), x[:25]), np.arange(STREAMS) % 2 == 0
    before, seen = to_bytes(state), x[25].copy()
    detector.step(state, x[25])
    detector.step(state, x[25], mask)
    detector.restart(state, mask)
    verdict(detector, state)
    assert to_bytes(state) == before
    assert_array_equal(x[25], seen)
    assert_array_equal(mask, np.arange(STREAMS) % 2 == 0)


@every
def test_the_same_steps_give_the_same_bits(setting):
    x = observations(setting)
    first, second = (to_bytes(fed(setting.detector, setting.detector.init(STREAMS), x)) for _ in range(2))
    assert first == second


@every
def test_detector_and_state_continue_after_pickling(setting):
    detector, x = setting.detector, observations(setting)
    state = fed(detector, detector.init(STREAMS), x[:25])
    other, resumed = pickle.loads(pickle.dumps((detector, state)))
    assert to_bytes(fed(other, resumed, x[25:])) == to_bytes(fed(detector, state, x[25:]))


@every
def test_a_state_stored_as_bytes_continues(setting):
    detector, x = setting.detector, observations(setting)
    state = fed(detector, detector.init(STREAMS), x[:25])
    resumed = from_bytes(to_bytes(state), detector.init(1))
    assert to_bytes(fed(detector, resumed, x[25:])) == to_bytes(fed(detector, state, x[25:]))


@every
def test_a_stream_that_is_not_active_keeps_its_bits_and_is_not_read(setting):
    detector, x, active = setting.detector, observations(setting), np.arange(STREAMS) % 3 != 0
    state = fed(detector, detector.init(STREAMS), x[:25])
    column = x[25].copy()
    column[~active] = np.nan
    after, everyone = detector.step(state, column, active), detector.step(state, x[25])
    assert_same_verdict(detector, take(after, active), [part[active] for part in verdict(detector, everyone)])
    assert_same_verdict(detector, take(after, ~active), [part[~active] for part in verdict(detector, state)])
    assert_same_rows(after, state, ~active)
    later, never = (fed(detector, s, x[26:]) for s in (after, state))
    assert_same_verdict(detector, take(later, ~active), [part[~active] for part in verdict(detector, never)])


@every
def test_a_restarted_stream_is_as_new_and_the_others_keep_their_bits(setting):
    detector, x, mask = setting.detector, observations(setting), np.arange(STREAMS) % 3 == 0
    state = fed(detector, detector.init(STREAMS), x[:25])
    restarted, fresh = detector.restart(state, mask), detector.init(STREAMS)
    for column in (None, *x[25:]):
        if column is not None:
            restarted, state, fresh = (detector.step(s, column) for s in (restarted, state, fresh))
        assert_same_verdict(detector, take(restarted, mask), [part[mask] for part in verdict(detector, fresh)])
        assert_same_verdict(detector, take(restarted, ~mask), [part[~mask] for part in verdict(detector, state)])
        assert_same_rows(restarted, state, ~mask)


@every
def test_the_change_is_placed_between_the_first_and_the_next_observation(setting):
    detector, state = setting.detector, setting.detector.init(STREAMS)
    for tick, column in enumerate(observations(setting), start=1):
        state = detector.step(state, column)
        changed = detector.changed_at(state)
        assert changed.dtype == np.int64
        assert ((changed >= 1) & (changed <= max(tick, setting.warm) + 1)).all()
        assert_array_equal(detector.alarms(state), detector.statistic(state) >= detector.threshold)


@every
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_what_is_no_number_is_refused_with_the_first_stream_that_has_it(setting, value):
    detector, column = setting.detector, observations(setting)[0].copy()
    column[[4, 6]] = value
    if value == np.inf and detector.takes_infinity:
        assert np.isfinite(detector.statistic(detector.step(detector.init(STREAMS), column))).all()
        return
    with pytest.raises(ValueError, match="2 active streams have an observation that is not allowed, the first is stream 4"):
        detector.step(detector.init(STREAMS), column)
    with pytest.raises(ValueError, match=r"1 active streams have .* the first is stream 6"):
        detector.step(detector.init(STREAMS), column, np.arange(STREAMS) != 4)


@every
def test_masks_and_shapes_are_checked(setting):
    detector, column = setting.detector, observations(setting)[0]
    state = detector.init(STREAMS)
    for wrong in (column[:-1], column[None], column[..., None, None]):
        with pytest.raises(ValueError, match="must hold one"):
            detector.step(state, wrong)
    for mask in (np.ones(STREAMS - 1, bool), np.ones(STREAMS)):
        with pytest.raises(ValueError, match="active must be booleans"):
            detector.step(state, column, mask)
        with pytest.raises(ValueError, match="mask must be booleans"):
            detector.restart(state, mask)


@every
def test_there_must_be_a_stream(setting):
    for streams in (0, -1):
        with pytest.raises(ValueError, match="streams must be at least 1"):
            setting.detector.init(streams)


@every
def test_a_state_shares_no_memory_with_the_one_before(setting):
    detector, x = setting.detector, observations(setting)
    state = fed(detector, detector.init(STREAMS), x[:25])
    after = detector.step(state, x[25])
    kept = to_bytes(after)
    for _, column in columns(state):
        column[...] = 0
    assert to_bytes(after) == kept
