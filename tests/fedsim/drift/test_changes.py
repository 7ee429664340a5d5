"""Changes against closed forms, NumPy and SciPy."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.ndimage import gaussian_filter

from fedsim import encoding
from fedsim.drift import (
    Cells,
    ClassPrior,
    Contrast,
    DomainSwitch,
    Draws,
    GaussianBlur,
    GaussianNoise,
    Invert,
    LabelNoise,
    LabelSwap,
    Rotation,
)
from fedsim.randomness import rng_for

T, B, K = 6, 16, 10
CORRUPTIONS = [GaussianNoise(0.3), GaussianNoise(severity=3), GaussianBlur(1.0), Rotation(30), Rotation(90), Invert(), Contrast(0.3)]
CHANGES = [*CORRUPTIONS, LabelSwap(cycle=4), LabelSwap(pairs=((0, 9),)), LabelNoise(0.5)]
SHAPES = [(64,), (1, 8, 8), (3, 32, 32)]


def draws(client=3, num=T, seed=0):
    return Draws(seed=seed, client=client, ticks=np.arange(num), batch=B, num_classes=K)


def examples(shape, num=T, dtype=np.float32):
    rng = np.random.default_rng(0)
    return rng.random((num, B, *shape)).astype(dtype), rng.integers(0, K, (num, B))


def cells(labels=K, domains=3, names=("a", "b", "c")):
    label, domain = (a.ravel() for a in np.meshgrid(np.arange(labels), np.arange(domains), indexing="ij"))
    return Cells(
        labels=label,
        domains=domain,
        counts=np.full(len(label), 7),
        num_classes=labels,
        num_domains=domains,
        domain_names=names,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_strength_zero_is_the_identity_bit_for_bit(change, shape):
    x, y = examples(shape)
    new_x, new_y = change.apply(x, y, np.zeros((T, B)), draws())
    assert_array_equal(new_x, x)
    assert_array_equal(new_y, y)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CORRUPTIONS, ids=str)
def test_corruptions_keep_shape_dtype_range_and_the_examples_they_do_not_touch(change, shape):
    for dtype in (np.float32, np.float64):
        x, y = examples(shape, dtype=dtype)
        before = x.copy()
        strength = np.where(np.arange(T * B).reshape(T, B) % 3 == 0, 1.0, 0.0)
        strength[1] = 0
        new, _ = change.apply(x, y, strength, draws())
        assert (new.shape, new.dtype) == (x.shape, x.dtype)
        assert new.min() >= 0
        assert new.max() <= 1
        assert_array_equal(new[strength == 0], x[strength == 0])
        assert not np.array_equal(new[strength > 0], x[strength > 0])
        assert_array_equal(x, before)


def test_severity_zero_of_every_corruption_is_the_identity():
    x, y = examples((3, 32, 32))
    for kind in (GaussianNoise, GaussianBlur, Rotation, Invert, Contrast):
        assert_allclose(kind(severity=0).apply(x, y, np.ones((T, B)), draws())[0], x, atol=1e-6)
        assert not kind(severity=0).alters(np.ones(1), cells(), rng_for(0))
        assert kind(severity=2).alters(np.ones(1), cells(), rng_for(0))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_tick_s_outcome_does_not_depend_on_the_other_ticks(change):
    x, y = examples((64,))
    whole = change.apply(x, y, np.ones((T, B)), draws())
    for t in range(T):
        one = Draws(seed=0, client=3, ticks=np.array([t]), batch=B, num_classes=K)
        alone = change.apply(x[t : t + 1], y[t : t + 1], np.ones((1, B)), one)
        assert_array_equal(alone[0][0], whole[0][t])
        assert_array_equal(alone[1][0], whole[1][t])


def test_noise_differs_between_clients_ticks_and_seeds():
    x, y = examples((64,))
    x[:] = 0.5
    change, ones = GaussianNoise(0.1), np.ones((T, B))
    a = change.apply(x, y, ones, draws())[0]
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(a, change.apply(x, y, ones, draws(client=4))[0])
    assert not np.array_equal(a, change.apply(x, y, ones, draws(seed=1))[0])


def test_noise_has_the_stated_standard_deviation_and_the_normal_law():
    x = np.full((200, B, 64), 0.5, np.float32)
    noise = GaussianNoise(0.05).apply(x, np.zeros((200, B), int), np.ones((200, B)), draws(num=200))[0] - x
    assert noise.std() == pytest.approx(0.05, rel=0.01)
    assert abs(noise.mean()) < 4 * 0.05 / np.sqrt(noise.size)
    assert stats.kstest(noise.ravel()[:20_000] / 0.05, "norm").pvalue > 0.001


def test_severity_reads_the_table_of_the_picture_s_size_and_interpolates():
    half = np.full(1, 0.5)
    assert_allclose(GaussianNoise(severity=3).level(np.ones(1), 8), 0.3)
    assert_allclose(GaussianNoise(severity=3).level(np.ones(1), 32), 0.08)
    assert_allclose(GaussianNoise(severity=3).level(np.ones(1), 224), 0.18)
    assert_allclose(GaussianNoise(severity=4.5).level(np.ones(1), 8), 0.45)
    assert_allclose(GaussianNoise(severity=2).level(half, 8), 0.1)
    assert_allclose(GaussianNoise(0.8).level(half, 8), 0.4)
    assert_allclose(Contrast(0.5).level(half, 8), 0.75)
    assert_allclose(Contrast(severity=0.5).level(np.ones(1), 8), 0.875)


@pytest.mark.parametrize("side", [7, 8, 32])
@pytest.mark.parametrize("quarter", [1, 2, 3, 4, -1])
def test_rotation_by_right_angles_is_rot90_exactly(side, quarter):
    x, y = examples((side * side,))
    new = Rotation(90 * quarter).apply(x, y, np.ones((T, B)), draws())[0]
    expected = np.rot90(x.reshape(T, B, side, side), quarter, axes=(2, 3))
    assert_array_equal(new.reshape(expected.shape), expected)


def test_rotation_of_a_rectangle_by_180_degrees_turns_it_over():
    x, y = examples((1, 5, 8))
    new = Rotation(180).apply(x, y, np.ones((T, B)), draws())[0]
    assert_array_equal(new, x[..., ::-1, ::-1])


def test_rotation_keeps_a_smooth_disc_and_moves_a_point_counterclockwise():
    side = 33
    rows, columns = np.indices((side, side)) - (side - 1) / 2
    disc = np.exp(-(rows**2 + columns**2) / 30).astype(np.float32)
    point = np.exp(-((rows - 0) ** 2 + (columns - 10) ** 2) / 4).astype(np.float32)
    x = np.stack([disc, point])[None]
    turned = Rotation(30).apply(x, np.zeros((1, 2), int), np.ones((1, 2)), Draws(seed=0, client=0, ticks=np.arange(1), batch=2))[0][0]
    assert_allclose(turned[0], disc, atol=0.02)
    row, column = np.unravel_index(turned[1].argmax(), (side, side))
    assert (row, column) == (16 - round(10 * np.sin(np.pi / 6)), 16 + round(10 * np.cos(np.pi / 6)))


def test_blur_equals_scipy_for_each_strength():
    x, y = examples((3, 32, 32))
    strength = np.where(np.arange(B) % 2, 1.0, 0.5) * np.ones((T, 1))
    new = GaussianBlur(1.0).apply(x, y, strength, draws())[0]
    for b in (0, 1):
        assert_allclose(new[2, b], gaussian_filter(x[2, b], (0, strength[2, b], strength[2, b]), mode="nearest"), atol=1e-6)


def test_invert_and_contrast_match_their_formulas():
    x, y = examples((3, 32, 32))
    assert_allclose(Invert().apply(x, y, np.ones((T, B)), draws())[0], 1 - x, atol=1e-6)
    mean = x.mean(axis=(3, 4), keepdims=True)
    assert_allclose(Contrast(0.3).apply(x, y, np.ones((T, B)), draws())[0], (x - mean) * 0.3 + mean, atol=1e-6)


def test_label_swap_cycles_labels_and_keeps_the_inputs():
    x, y = examples((64,))
    new_x, new_y = LabelSwap(cycle=4).apply(x, y, np.ones((T, B)), draws())
    assert_array_equal(new_x, x)
    assert_array_equal(new_y, np.where(y < 4, (y + 1) % 4, y))
    swapped = LabelSwap(pairs=((0, 9), (2, 3))).apply(x, y, np.ones((T, B)), draws())[1]
    assert_array_equal(swapped, np.array([9, 1, 3, 2, 4, 5, 6, 7, 8, 0])[y])
    assert_array_equal(np.bincount(swapped.ravel(), minlength=K)[[9, 0]], np.bincount(y.ravel(), minlength=K)[[0, 9]])


def test_label_noise_hits_the_stated_share_and_every_other_class_alike():
    y = np.zeros((500, B), np.int64)
    new = LabelNoise(0.3).apply(np.zeros((500, B, 1)), y, np.ones((500, B)), draws(num=500))[1]
    assert stats.binomtest(int((new != 0).sum()), new.size, 0.3).pvalue > 0.001
    assert stats.chisquare(np.bincount(new[new > 0], minlength=K)[1:]).pvalue > 0.001
    half = LabelNoise(0.3).apply(np.zeros((500, B, 1)), y, np.full((500, B), 0.5), draws(num=500))[1]
    assert stats.binomtest(int((half != 0).sum()), half.size, 0.15).pvalue > 0.001


def test_domain_switch_moves_all_mass_and_keeps_the_class_shares():
    c = cells()
    law = np.random.default_rng(1).dirichlet(np.ones(len(c.labels)))
    new = DomainSwitch("b").law(law, c, rng_for(0))
    assert_allclose(c.by_domain(new), [0, 1, 0])
    assert_allclose(c.by_label(new), c.by_label(law))
    assert_allclose(DomainSwitch(1).law(law, c, rng_for(0)), new)


def test_domain_switch_without_a_target_goes_where_the_client_has_least():
    c = cells()
    law = np.where(c.domains == 0, 0.5, np.where(c.domains == 1, 0.3, 0.2)) / K
    assert_allclose(c.by_domain(DomainSwitch().law(law, c, rng_for(0))), [0, 0, 1])
    only = np.where(c.domains == 0, 1.0, 0.0) / K
    goals = [int(c.by_domain(DomainSwitch().law(only, c, rng_for(0, i))).argmax()) for i in range(200)]
    assert set(goals) == {1, 2}
    assert stats.binomtest(goals.count(1), 200).pvalue > 0.001


def test_class_prior_keeps_the_law_inside_each_class():
    c = cells()
    law = np.random.default_rng(2).dirichlet(np.ones(len(c.labels)))
    weights = np.arange(1.0, 11.0)
    new = ClassPrior(weights=tuple(weights)).law(law, c, rng_for(0))
    assert_allclose(c.by_label(new), weights / weights.sum())
    inside_old, inside_new = law / c.by_label(law)[c.labels], new / c.by_label(new)[c.labels]
    assert_allclose(inside_new, inside_old)


def test_class_prior_keeps_k_of_the_client_s_classes_in_proportion():
    c = cells()
    law = np.where(c.labels < 6, c.labels + 1.0, 0.0)
    law /= law.sum()
    new = c.by_label(ClassPrior(keep=3).law(law, c, rng_for(0)))
    kept = np.flatnonzero(new)
    assert len(kept) == 3
    assert kept.max() < 6
    assert_allclose(new[kept], (kept + 1) / (kept + 1).sum())
    few = np.where(c.labels == 4, 1.0, 0.0) / 3
    assert not ClassPrior(keep=3).alters(few, c, rng_for(0))


def test_class_prior_draws_new_classes_from_the_client_s_domains():
    c = cells()
    law = np.where((c.labels == 0) & (c.domains == 2), 1.0, 0.0)
    new = ClassPrior(alpha=1.0).law(law, c, rng_for(0))
    assert (c.by_label(new) > 0).all()
    assert_allclose(c.by_domain(new), [0, 0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(-0.1), "sigma must be finite and lie in"),
        (lambda: GaussianNoise(float("nan")), "sigma"),
        (lambda: GaussianNoise(0.1, severity=2), "not both"),
        (lambda: GaussianBlur(severity=5.5), r"severity must lie in \[0, 5\]"),
        (lambda: Invert(1.5), "amount"),
        (lambda: Rotation(720), "degrees"),
        (lambda: LabelSwap(), "exactly one"),
        (lambda: LabelSwap(cycle=1), "at least 2"),
        (lambda: LabelSwap(pairs=((0, 1), (1, 2))), "at most once"),
        (lambda: LabelNoise(1.2), "rate"),
        (lambda: ClassPrior(), "exactly one"),
        (lambda: ClassPrior(keep=0), "keep"),
        (lambda: ClassPrior(weights=(-1.0, 2.0)), "weights"),
        (lambda: ClassPrior(alpha=0.0), "alpha"),
    ],
)
def test_bad_parameters_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "inputs", "message"),
    [
        (Rotation(30), np.zeros((4, 63)), "shape"),
        (GaussianNoise(0.1), np.full((4, 64), 2.0), r"\[0, 1\]"),
        (LabelSwap(cycle=11), np.zeros((4, 64)), "moves class 10, but the task has 10 classes"),
        (ClassPrior(keep=11), np.zeros((4, 64)), "more classes than the task has"),
        (ClassPrior(weights=(1.0,)), np.zeros((4, 64)), "1 weights, but the task has 10"),
        (DomainSwitch("d"), np.zeros((4, 64)), "one of"),
        (DomainSwitch(3), np.zeros((4, 64)), "one of"),
    ],
)
def test_changes_the_data_do_not_allow_are_refused(change, inputs, message):
    with pytest.raises(ValueError, match=message):
        change.check(inputs, cells())


def test_domain_switch_needs_domains():
    with pytest.raises(ValueError, match="at least 2 values"):
        DomainSwitch().check(np.zeros((4, 64)), cells(domains=1, names=("",)))


@pytest.mark.parametrize("change", [*CHANGES, DomainSwitch("b"), ClassPrior(weights=(1.0, 2.0))], ids=str)
def test_changes_survive_encoding(change):
    assert encoding.decode(*encoding.encode(change)) == change
