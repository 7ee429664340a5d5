"""The parts of a page that stands alone: no network, no scripts, light and dark, wide and narrow."""

import re
from collections.abc import Sequence
from html import escape

_UNIT = re.compile(r"(\d) (%|nats|[kMGT]?B|ticks|s|min|h|days)(?!\w)")
_CSS = """
:root { color-scheme: light dark; --paper: #fefefe; --ink: #1f2430; --muted: #6d7480; --grid: #dde1e7; --tile: #f4f6f9; --accent: #2f7fc1 }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --ink: #e6e9ee; --muted: #9aa2ae; --grid: #343a44; --tile: #1e2229; --accent: #5fb3dd } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.015em; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; letter-spacing: -.01em }
h2 small { color: var(--accent); font-weight: 600; margin-right: .5em }
p { max-width: 44rem; margin: .5rem 0 1rem }
.lead { font-size: 1.1rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 44%), 1fr)); gap: .75rem; margin: 1.5rem 0 }
.tile { background: var(--tile); border-radius: .6rem; padding: .8rem 1rem }
.tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; letter-spacing: -.01em }
.tile span, .tile b { overflow-wrap: anywhere }
.tile span { font-size: .85rem; font-weight: 600 }
.tile small { display: block; color: var(--muted); font-size: .8rem; line-height: 1.35; margin-top: .2rem }
figure { margin: 1.25rem 0 }
figure svg { display: block; width: 100%; height: auto }
figure svg text { font-family: inherit !important }
figcaption { color: var(--muted); font-size: .875rem; max-width: 44rem; margin-top: .4rem }
.narrow { display: none }
@media (max-width: 40rem) { .wide { display: none } .narrow { display: block } main { padding: 1.5rem 1rem 3rem } h1 { font-size: 1.5rem } .tile b { font-size: 1.2rem } }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid) }
th { color: var(--muted); font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; white-space: normal }
details { border-top: 1px solid var(--grid); padding: .6rem 0 }
summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; background: var(--tile); border-radius: .6rem; padding: 1rem; font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
footer { color: var(--muted); font-size: .85rem; margin-top: 2.5rem; overflow-wrap: anywhere }
@media print { .narrow { display: none } .wide { display: block } details { break-inside: avoid } }
"""


def page(title: str, *parts: str) -> str:
    """One complete document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    body = "\n".join([f"<h1>{_text(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n'


def section(number: int, title: str, *parts: str) -> str:
    """A numbered chapter of the story."""
    return "\n".join([f"<section><h2><small>{number}</small>{_text(title)}</h2>", *parts, "</section>"])


def paragraph(text: str, *, lead: bool = False) -> str:
    """Plain text as a paragraph."""
    return f"<p{' class=lead' if lead else ''}>{_text(text)}</p>"


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: (label, value, what it means)."""
    cells = "".join(f'<div class="tile"><span>{_text(a)}</span><b>{_text(b)}</b><small>{_text(c)}</small></div>' for a, b, c in entries)
    return f'<div class="tiles">{cells}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table; it scrolls by itself where the page is narrow."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(wide: str, narrow: str, description: str) -> str:
    """A figure drawn for both page widths, with its caption, which also names it to screen readers."""
    label = f'<svg role="img" aria-label="{escape(description)}" '
    drawings = "".join(f'<div class="{name}">{svg.replace("<svg ", label, 1)}</div>' for name, svg in (("wide", wide), ("narrow", narrow)))
    return f"<figure>{drawings}<figcaption>{_text(description)}</figcaption></figure>"


def folded(title: str, text: str) -> str:
    """Preformatted text behind a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def footer(text: str) -> str:
    """The last line."""
    return f"<footer>{_text(text)}</footer>"


def _text(text: str) -> str:
    """Escaped, with numbers tied to their units so that no line breaks between them."""
    return _UNIT.sub("\\1\u00a0\\2", escape(text))
