"""Pages that stand alone and tell what the tables hold."""

import ast
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest

from fedsim.runs import plots, style
from fedsim.runs.configuration import expression
from fedsim.runs.report import comparison_report
from fedsim.runs.run import Run
from fedsim.runs.schema import column
from fedsim.runs.scores import Scores, accuracy_over_time, score
from fedsim.runs.store import RunStore

VOID = {"meta", "br", "hr", "img", "path", "use", "rect"}
SERVED = ("ticks", "events", "truth")


@dataclass(frozen=True)
class Plan:
    name: str = "digits"
    seed: int = 0


def stored(directory, tables, plan=None):
    with RunStore.create(directory, plan or Plan()) as store:
        for name, table in tables.items():
            if len(table):
                store.write_part(name, 1, {c: column(table, c) for c in table.column_names})
        store.mark_complete()
    return Run(store.path)


class Page(HTMLParser):
    """Checks nesting and collects ids, references, attributes that could load something, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.tags, self.words = [], [], set(), set(), []
        self.references |= set(re.findall(r"url\(#([^)]+)\)", text))
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                assert value.startswith("#"), f"{tag} loads {value}"
                self.references.add(value[1:])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def told(tmp_path_factory, tables):
    """A run and its page, written once."""
    run = stored(tmp_path_factory.mktemp("runs"), tables)
    return run, run.report().read_text()


def test_the_page_needs_nothing_but_itself(told):
    _, text = told
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert len(text) < 600_000


def test_figures_on_one_page_do_not_share_ids(told):
    page = Page(told[1])
    anchors = [i for i in page.ids if i in page.references]
    assert len(anchors) == len(set(anchors))
    assert page.references <= set(page.ids)


def test_the_numbers_come_first_and_the_story_in_order(told):
    run, text = told
    page, scores = Page(text), run.scores()
    assert f"{100 * scores.accuracy_before:.1f} % → {100 * scores.accuracy_end:.1f} %" in page.text
    assert f"{scores.detected} of {scores.num_changed} changes raised an alarm" in page.text
    chapters = [page.text.index(f"{i} {title} ") for i, title in enumerate(("Train", "Deploy", "Watch", "React"), start=1)]
    assert chapters == sorted(chapters)
    assert page.text.index("→") < chapters[0]
    assert run.digest() in page.text
    assert "Plan(name='digits', seed=0)" in page.text


def test_colours_follow_the_page(told):
    _, text = told
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    for colour in (style.INK, style.MUTED, style.GRID, style.PAPER):
        assert colour not in drawings
    assert "var(--ink)" in drawings
    assert "prefers-color-scheme: dark" in text


def test_figures_are_kept_as_pictures_too(told):
    run, _ = told
    names = {path.name for path in (run.path / "figures").iterdir()}
    assert names == {f"{name}.png" for name in ("training", "devices", "loss", "events", "delays")}
    assert all((run.path / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_the_same_tables_give_the_same_page_and_drawing_leaves_no_trace(told):
    run, text = told
    before = dict(mpl.rcParams)
    assert run.report().read_text() == text
    assert dict(mpl.rcParams) == before


def test_names_from_outside_cannot_break_the_page(tmp_path, made_up_run):
    made = made_up_run(clients=12, ticks=40, change_at=20, changed=3)
    page = stored(tmp_path, {"ticks": made["ticks"], "truth": made["truth"]}, Plan(name="<script>alert(1)</script>")).report().read_text()
    assert "<script>" not in page
    Page(page)


@pytest.mark.parametrize(
    ("kept", "chapters"),
    [
        ((), []),
        (("rounds", "clients"), ["1 Train"]),
        (("rounds", "clients", "deployments"), ["1 Train", "2 Deploy"]),
        (("truth", "ticks"), ["1 Watch"]),
    ],
)
def test_a_run_that_is_not_finished_tells_what_it_has(tmp_path, tables, kept, chapters):
    run = stored(tmp_path, {name: tables[name] for name in kept})
    page = Page(run.report().read_text())
    assert re.findall(r"\b\d (?:Train|Deploy|Watch|React)\b", page.text) == chapters
    assert run.summary().startswith(run.name)
    assert "nan" not in page.text
    assert "nan" not in run.summary()


def test_a_world_without_change_is_told_as_such(tmp_path, made_up_run):
    made = made_up_run(clients=20, ticks=60, change_at=30, changed=0)
    text = Page(stored(tmp_path, made).report().read_text()).text
    assert "20 clients then served for 60 ticks in a world that did not change" in text
    assert "Detection delay" not in text


def test_the_summary_is_aligned_and_complete(told):
    summary = told[0].summary()
    for words in ("test accuracy", "budget phone", "clients that change", "false alarms", "harm (nats)"):
        assert words in summary
    lines = summary.split("\n\n")[2].split("\n")
    assert len({line.rindex(word) + len(word) for line, word in zip(lines, [line.split()[-1] for line in lines], strict=True)}) == 1


@pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
def test_no_label_leaves_its_figure(tables, width):
    served = {name: tables[name] for name in SERVED}
    figures = [
        plots.training(tables["rounds"], width=width),
        plots.devices(tables["deployments"], tables["ticks"], tables["truth"], width=width),
        plots.fleet_loss(**served, width=width),
        plots.raster(**served, width=width),
        plots.delays(**served, width=width),
    ]
    for drawn in figures:
        drawn.canvas.draw()
        inside, box = drawn.bbox, drawn.get_tightbbox()
        assert box.x0 >= -0.05, drawn
        assert box.x1 <= inside.width / drawn.dpi + 0.05, drawn


def test_a_large_fleet_is_thinned_evenly(made_up_run):
    made = made_up_run(clients=400, ticks=40, change_at=10, changed=390)
    drawn = plots.raster(**{name: made[name] for name in SERVED})
    assert drawn.axes[0].get_title(loc="left") == "160 of 400 clients, one row each"


def test_policies_are_compared_on_one_page(tmp_path, made_up_run):
    scores, series = {}, {}
    for policy in ("never", "alarm"):
        made = [made_up_run(policy=policy, clients=30, ticks=60, change_at=20, changed=10, seed=s) for s in range(2)]
        scores[policy] = [score(rounds=t["rounds"], **{name: t[name] for name in SERVED}) for t in made]
        series[policy] = (np.arange(60), np.array([accuracy_over_time(ticks=t["ticks"], truth=t["truth"])[1] for t in made]))
    page = Page(comparison_report(scores, tmp_path / "comparison.html", accuracy=series).read_text())
    harm = np.mean([s.harm for s in scores["alarm"]])
    assert f"Least harm: alarm, {harm:,.0f} nats" in page.text
    assert (tmp_path / "figures" / "policies.png").is_file()
    assert "mean ± standard deviation over seeds never alarm" in page.text


def test_policies_can_be_compared_by_scores_alone(tmp_path):
    one = Scores(harm=3.0, worker_seconds=2.0, accuracy_end=0.5)
    page = comparison_report({"a": [one], "b": [replace(one, harm=1.0)]}, tmp_path / "page.html", details={"Paired": "b - a = -2"})
    assert "Least harm: b, 1 nats. Most: a, 3 nats." in Page(page.read_text()).text
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one policy"):
            comparison_report(nothing, tmp_path / "page.html")


def test_a_configuration_reads_as_python():
    inner = {"type": "fedsim.policies:Periodic", "fields": {"every": 40, "stagger": True}}
    several = {"tuple": [0.4, {"float": "inf"}, {"array": "a0"}]}
    tree = {"type": "fedsim.simulation:Simulation", "fields": {"policy": inner, "levels": several, "one": {"tuple": [1]}}}
    tree["fields"] |= {"kind": {"name": "detection.cusum:CUSUM"}, "map": {"map": [["k", [1, None, "text" * 20]], ["l", ["text" * 5] * 4]]}}
    text = expression(tree)
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert [k.arg for k in call.keywords] == ["policy", "levels", "one", "kind", "map"]
    assert ast.literal_eval(call.keywords[2].value) == (1,)
    assert max(map(len, text.split("\n"))) <= 100


def test_scores_of_the_page_are_those_of_the_tables(told, tables):
    assert told[0].scores() == score(rounds=tables["rounds"], deployments=tables["deployments"], **{name: tables[name] for name in SERVED})
