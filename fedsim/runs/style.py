"""Colours and axes of every figure: safe for colour-blind readers (after Okabe, Ito 2008), legible on light and dark pages.

Ink, grid and paper are placeholders that the report turns into colours of the page; the others are mid-tones.
"""

import io
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

P = ParamSpec("P")
R = TypeVar("R")

INK, MUTED, GRID, PAPER = "#1f2430", "#6d7480", "#dde1e7", "#fefefe"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = "#2f7fc1", "#e08a1e", "#1a9c7b", "#d1495b", "#a763ad", "#5fb3dd", "#8d94a0"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)
LEVELS = ("#c3ddf0", "#8fbfe3", "#5c9fd2", "#3479b4", "#1d568c")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)), "-", "-")
WIDE, NARROW = 8.4, 3.9  # inches: a page column and a phone

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.7,
    "legend.borderaxespad": 0.0,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
}


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """Let ``plot`` make or write its figure in this style; what the process has set is put back."""

    @wraps(plot)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(_STYLE):
            return plot(*args, **kwargs)

    return inside


def figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` x ``height`` inches that keeps its labels inside."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def whole_numbers(axes: Axes, which: str = "x") -> None:
    """Ticks of one axis at whole numbers: rounds, ticks and counts have no halves."""
    (axes.xaxis if which == "x" else axes.yaxis).set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))


def bare(axes: Axes) -> None:
    """Without grid and value axis: for strips and bars that carry their own numbers."""
    axes.grid(False)
    axes.spines["left"].set_visible(False)


@styled
def settled(drawn: Figure) -> Figure:
    """The figure with its layout computed once, for all the forms it is written in."""
    engine = drawn.get_layout_engine()
    if engine is not None:
        engine.execute(drawn)
        drawn.set_layout_engine("none")
    return drawn


@styled
def png(drawn: Figure, dpi: int = 150) -> bytes:
    """The figure on white."""
    with io.BytesIO() as file:
        drawn.savefig(file, format="png", dpi=dpi)
        return file.getvalue()


@styled
def svg(drawn: Figure, name: str) -> str:
    """The figure as an SVG element that takes ink, grid and paper from the page; ``name`` keeps its ids apart from others'."""
    with mpl.rc_context({"svg.hashsalt": name}), io.StringIO() as file:
        drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return re.sub(r"\n\s*", "\n", text)
