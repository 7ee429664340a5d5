import io
import subprocess
import sys

import numpy as np
import pytest

from detection import CUSUM, Gaussian, ScanB, exact_run_length, likelihood_increment
from detection.evaluation import operating_curve
from detection.figures import delay_by_shift, operating_curves, statistic_path

pytest.importorskip("matplotlib")
NULL, SHIFTED = Gaussian(0.0, 1.0), Gaussian(1.0, 1.0)
PAGE = CUSUM(pre=NULL, post=SHIFTED, threshold=6.0)


def drawn(figure):
    figure.savefig(io.BytesIO(), format="png")
    return figure.axes[0]


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


@pytest.fixture(scope="module")
def curve():
    return operating_curve(PAGE, NULL, SHIFTED, thresholds=[2.0, 3.0, 4.0], rng=np.random.default_rng(0), runs=300, horizon=300)


def test_an_operating_curve_shows_every_run_length_and_delay_with_its_interval(curve):
    axes = drawn(operating_curves({"CUSUM": curve}))
    (bars,) = axes.containers
    line, _, (across, up) = bars.lines
    assert line.get_xdata() == pytest.approx([p.arl.value for p in curve])
    assert line.get_ydata() == pytest.approx([p.delay.value for p in curve])
    assert [s[:, 0] for s in across.get_segments()] == [pytest.approx(p.arl.interval) for p in curve]
    assert [s[:, 1] for s in up.get_segments()] == [pytest.approx(p.delay.interval) for p in curve]
    assert bars.get_label() == "CUSUM"
    assert axes.get_xscale() == "log"


def test_points_without_a_run_length_are_left_out_of_an_operating_curve(curve):
    rng = np.random.default_rng(0)
    silent = operating_curve(PAGE, NULL, SHIFTED, thresholds=[1e6], rng=rng, runs=20, horizon=20)
    axes = drawn(operating_curves({"some": curve + silent, "none": silent}))
    assert [len(bars.lines[0].get_xdata()) for bars in axes.containers] == [3, 0]


def test_the_path_of_a_statistic_shows_the_alarm_the_threshold_and_both_changes():
    stream = np.random.default_rng(1).standard_normal(160) + (np.arange(160) >= 100)
    axes = drawn(statistic_path(PAGE, stream, 101))
    found, value, path = lines(axes), 0.0, []
    for x in stream:
        value = max(value + x - 0.5, 0.0)
        path.append(value)
    assert found["statistic"].get_xdata() == pytest.approx(np.arange(1, 161))
    assert found["statistic"].get_ydata() == pytest.approx(path)
    assert set(found["threshold"].get_ydata()) == {6.0}
    assert set(found["true change"].get_xdata()) == {101.0}
    alarm = int(np.argmax(np.array(path) >= 6.0))
    assert (found["alarm"].get_xdata()[0], found["alarm"].get_ydata()[0]) == pytest.approx((alarm + 1, path[alarm]))
    assert found["estimated change"].get_xdata()[0] == 1 + np.flatnonzero(np.array(path[:alarm]) == 0)[-1] + 1


def test_a_quiet_stream_shows_no_alarm_and_no_change():
    assert set(lines(drawn(statistic_path(PAGE, np.zeros(20), np.nan)))) == {"statistic", "threshold"}


def test_vector_streams_have_a_path_too():
    reference = np.random.default_rng(0).standard_normal((200, 2))
    scan = ScanB.fit(reference, threshold=50.0, rng=np.random.default_rng(1))
    path = lines(drawn(statistic_path(scan, reference[:60])))["statistic"].get_ydata()
    state = scan.init(1)
    for x in reference[:60]:
        state = scan.step(state, x[None])
    assert len(path) == 60
    assert path[-1] == scan.statistic(state)[0]


def test_delays_by_shift_mark_the_worst_point_of_each_design():
    shifts = [0.5, 1.0, 2.0]
    delays = {
        str(d): [exact_run_length(likelihood_increment(NULL, Gaussian(d, 1.0)), Gaussian(s, 1.0), 5.0) for s in shifts] for d in (0.5, 1)
    }
    axes = drawn(delay_by_shift(shifts, delays))
    for name, line in delays.items():
        assert lines(axes)[name].get_xdata() == pytest.approx(shifts)
        assert lines(axes)[name].get_ydata() == pytest.approx(line)
    marked = [line for line in axes.lines if line.get_fillstyle() == "none"]
    assert [(m.get_xdata()[0], m.get_ydata()[0]) for m in marked] == [(0.5, max(line)) for line in delays.values()]


def test_figures_of_nothing_are_refused():
    for wrong in (lambda: operating_curves({}), lambda: delay_by_shift([1.0], {}), lambda: statistic_path(PAGE, [])):
        with pytest.raises(ValueError, match="at least one"):
            wrong()
    with pytest.raises(ValueError, match="one for each shift"):
        delay_by_shift([1.0, 2.0], {"a": [3.0]})


def test_neither_the_package_nor_its_figures_load_matplotlib_or_pyplot_before_they_draw():
    code = "import sys, detection.figures as f; a = 'matplotlib' in sys.modules; f.delay_by_shift([1.0], {'a': [2.0]}); print(a, 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]
