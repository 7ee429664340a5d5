"""Who changes when: against the stated laws, in closed form."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from fedsim import encoding
from fedsim.drift import (
    Abrupt,
    At,
    Clients,
    DomainSwitch,
    Drift,
    Everyone,
    Fraction,
    GaussianNoise,
    Geometric,
    Gradual,
    Incremental,
    InGroups,
    InRegion,
    LabelSwap,
    OnDevices,
    Rotation,
    Spreading,
    Staggered,
    UniformStart,
)
from fedsim.fleet import Fleet

HORIZON = 10**9


@pytest.fixture(scope="module")
def fleet():
    return Fleet.sample(4000, seed=0)


def nu(fleet, start, clients=None, ticks=HORIZON, seed=0, part=0):
    return Drift(Rotation(90), start, clients or Everyone()).schedule(fleet, ticks, seed, part).nu


def test_shorthand_means_at_and_fraction():
    assert Drift(GaussianNoise(0.8), at=200, clients=0.3) == Drift(GaussianNoise(0.8), start=At(200), clients=Fraction(0.3))
    assert Drift(DomainSwitch(), start=At(200), clients=Fraction(0.3)).onset == Abrupt()


def test_at_hits_exactly_the_fraction_and_nobody_else(fleet):
    found = nu(fleet, At(200), Fraction(0.3))
    assert (found == 200).sum() == 1200
    assert (found == -1).sum() == 2800


def test_fractions_nest_and_differ_between_seeds_and_drifts_of_a_scenario(fleet):
    small, large = (set(Fraction(p).ids(fleet, 0, 0)) for p in (0.1, 0.4))
    assert small < large
    assert small != set(Fraction(0.1).ids(fleet, 1, 0))
    overlap = len(large & set(Fraction(0.4).ids(fleet, 0, 1)))
    assert abs(overlap - 0.16 * 4000) < 5 * np.sqrt(4000 * 0.16 * 0.84)


def test_geometric_starts_follow_the_geometric_law(fleet):
    rho = 0.02
    waits = nu(fleet, Geometric(rho, after=100)) - 100
    edges = np.arange(0, 200, 10)
    counts = np.histogram(waits, [*edges, np.inf])[0]
    survival = (1 - rho) ** edges
    expected = np.diff(-np.append(survival, 0)) * len(waits)
    assert waits.min() == 0
    assert stats.chisquare(counts, expected).pvalue > 0.001
    assert_array_equal(nu(fleet, Geometric(1.0, after=5)), 5)


def test_uniform_starts_cover_both_ends_alike(fleet):
    found = nu(fleet, UniformStart(10, 19))
    assert stats.chisquare(np.bincount(found, minlength=20)[10:]).pvalue > 0.001
    assert (found.min(), found.max()) == (10, 19)


def test_a_client_s_start_does_not_depend_on_who_else_drifts(fleet):
    everyone, some = nu(fleet, Geometric(0.01)), nu(fleet, Geometric(0.01), Fraction(0.2))
    hit = some >= 0
    assert_array_equal(everyone[hit], some[hit])


def test_staggered_starts_follow_one_another(fleet):
    assert_array_equal(nu(fleet, Staggered(gap=7, first=20), Clients((5, 3, 9)))[[3, 5, 9]], [20, 27, 34])


def test_a_front_hits_a_client_on_the_first_tick_it_has_reached_it(fleet):
    found = nu(fleet, Spreading((0.5, 0.5), speed=0.01, at=100))
    distance = np.sqrt(((np.asarray(fleet.region) - 0.5) ** 2).sum(1))
    assert (0.01 * (found - 100) >= distance - 1e-12).all()
    assert (0.01 * (found - 101) < distance).all()


def test_device_groups_and_regions_select_by_column(fleet):
    name = fleet.device_names[1]
    assert_array_equal(nu(fleet, At(1), OnDevices(name)) >= 0, np.asarray(fleet.device) == 1)
    group = int(fleet.group[0])
    assert_array_equal(nu(fleet, At(1), InGroups((group,))) >= 0, np.asarray(fleet.group) == group)
    center = tuple(np.asarray(fleet.region)[0])
    inside = np.hypot(*(np.asarray(fleet.region) - center).T) <= 0.1
    assert_array_equal(nu(fleet, At(1), InRegion(center, 0.1)) >= 0, inside)


def test_a_start_beyond_the_horizon_is_never_and_nobody_changing_is_a_warning(fleet):
    assert (nu(fleet, Staggered(gap=1), ticks=10) >= 0).sum() == 10
    with pytest.warns(UserWarning, match="no client changes within 200 ticks"):
        nu(fleet, At(200), ticks=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nu(fleet, At(199), ticks=200)


def test_onsets_ramp_as_stated(fleet):
    hit = Clients((0,))
    for onset in (Gradual(4), Incremental(4)):
        schedule = Drift(Rotation(90), At(10), hit, onset).schedule(fleet, 100, 0)
        assert_allclose([schedule.alpha(t)[0] for t in (9, 10, 11, 12, 13, 50)], [0, 0.25, 0.5, 0.75, 1, 1])
        assert (schedule.alpha(50)[1:] == 0).all()
    abrupt = Drift(Rotation(90), At(10), hit).schedule(fleet, 100, 0)
    assert_allclose([abrupt.alpha(t)[0] for t in (9, 10, 11)], [0, 1, 1])


def test_gradual_mixes_whole_examples_in_the_stated_share_and_incremental_ramps_all(fleet):
    ticks = np.arange(90, 200)
    gradual = Drift(Rotation(90), At(100), Clients((0,)), Gradual(50)).schedule(fleet, 200, 0)
    strength = gradual.strength(0, ticks, 1000, 0, 0)
    assert set(np.unique(strength)) == {0.0, 1.0}
    for t, row in zip(ticks, strength, strict=True):
        assert stats.binomtest(int(row.sum()), 1000, gradual.alpha(t)[0]).pvalue > 1e-4
    incremental = Drift(Rotation(90), At(100), Clients((0,)), Incremental(50)).schedule(fleet, 200, 0)
    assert_array_equal(incremental.strength(0, ticks, 2, 0, 0), np.array([[incremental.alpha(t)[0]] * 2 for t in ticks]))
    assert not gradual.strength(1, ticks, 4, 0, 0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Geometric(0.0), r"rho must lie in \(0, 1\]"),
        (lambda: Geometric(1.5), "rho"),
        (lambda: At(-1), "At.tick"),
        (lambda: At(1.5), "At.tick"),
        (lambda: UniformStart(10, 9), "UniformStart.last"),
        (lambda: Spreading((0.5, 0.5), 0.0), "speed"),
        (lambda: Spreading((0.5, 1.5), 1.0), "center"),
        (lambda: InRegion((0.5, 0.5), -1), "radius"),
        (lambda: Fraction(0.0), "share"),
        (lambda: Fraction(1.1), "share"),
        (lambda: Clients(()), "numbers"),
        (lambda: Gradual(0), "Gradual.width"),
        (lambda: Drift(Rotation(90)), "exactly one of start= and at="),
        (lambda: Drift(Rotation(90), At(3), at=3), "exactly one"),
        (lambda: Drift("noise", at=3), "change must be a Change"),
        (lambda: Drift(LabelSwap(cycle=2), at=3, onset=Incremental(5)), "no degrees"),
    ],
)
def test_bad_schedules_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_clients_the_fleet_does_not_have_are_refused(fleet):
    for who, message in ((Clients((4000,)), "client 4000"), (OnDevices("toaster"), "toaster"), (InGroups((-5,)), "groups of the fleet")):
        with pytest.raises(ValueError, match=message):
            nu(fleet, At(1), who)
    nowhere = SimpleNamespace(region=np.full((3, 2), np.nan), __len__=lambda: 3)
    with pytest.raises(ValueError, match="without coordinates"):
        InRegion((0.5, 0.5), 0.1).ids(nowhere, 0, 0)


@pytest.mark.parametrize("start", [At(3), Geometric(0.1), UniformStart(1, 2), Staggered(2), Spreading((0.1, 0.2), 0.3)], ids=str)
@pytest.mark.parametrize("who", [Everyone(), Fraction(0.2), Clients((1, 2)), OnDevices("a"), InGroups(1), InRegion((0, 1), 1)], ids=str)
def test_drifts_survive_encoding(start, who):
    drift = Drift(Rotation(90), start, who, Incremental(3))
    assert encoding.decode(*encoding.encode(drift)) == drift
