"""The HTML around a report: one self-contained page, in the reader's light or dark."""

import html
import re
from collections.abc import Iterable
from typing import Any

# CSS variable: its colour on light and on dark paper.
PALETTE = {
    "paper": ("#ffffff", "#14171b"),
    "panel": ("#f6f7f9", "#1c2026"),
    "ink": ("#1f2329", "#e8eaed"),
    "muted": ("#69727d", "#9aa4af"),
    "line": ("#dfe3e8", "#333a43"),
    "blue": ("#2563eb", "#6ea0ff"),
    "orange": ("#d9580d", "#ff9357"),
    "violet": ("#7c4ddb", "#b494ff"),
    "green": ("#16875a", "#4fc793"),
}
MISSING = '<p class="missing">not recorded</p>'

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.2rem; margin: 3rem 0 .5rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
header p, .missing, figcaption { color: var(--muted); }
.warning { color: var(--orange); font-weight: 600; }
.numbers { display: grid; gap: 1px; margin: 1.5rem 0 0; background: var(--panel);
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
.numbers div { padding: .8rem 1rem; box-shadow: 0 0 0 1px var(--line); }
.numbers dt { color: var(--muted); font-size: .85rem; }
.numbers dd { margin: 0; font-size: 1.45rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.numbers dd small { display: block; min-height: 1.4em; color: var(--muted);
  font-size: .8rem; font-weight: 400; }
figure { margin: 0; }
svg, img { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.pair { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.tiles { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14.5rem), 1fr)); }
.thirds { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.tile img { height: 11rem; image-rendering: pixelated; }
.tile figcaption, .pair figcaption { font-size: .85rem; margin-bottom: .3rem; }
figcaption b { color: var(--ink); }
.paths { height: 5rem; margin-top: .3rem; background: var(--panel); }
.paths polyline { fill: none; stroke-width: 1.1; vector-effect: non-scaling-stroke; }
.paths .raised { stroke: var(--blue); } .paths .lowered { stroke: var(--orange); }
.paths .zero { stroke: var(--line); }
b.raised { color: var(--blue); } b.lowered { color: var(--orange); }
.scale { display: flex; align-items: center; gap: .7rem; margin: 1rem 0 1.2rem;
  color: var(--muted); font-size: .85rem; }
.scale .bar { flex: 0 1 16rem; height: .8rem; border-radius: 3px; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem 1.1rem; margin: .6rem 0; overflow-wrap: anywhere;
  white-space: pre-wrap; font: .87rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre b { color: var(--blue); }
summary { cursor: pointer; color: var(--muted); padding: .2rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; padding: .25rem 1.5rem .25rem 0; vertical-align: top; }
th { color: var(--muted); font-weight: 400; white-space: nowrap; }
td { overflow-wrap: anywhere; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Returns a whole HTML document of `parts`, which are HTML already."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
:root {{ color-scheme: light dark; {_variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}{_STYLE}</style>
</head>
<body>
<main>
{"".join(parts)}
</main>
</body>
</html>
"""


def section(title: str, content: str) -> str:
    """Returns a headed part of the page; empty content reads "not recorded"."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content or MISSING}\n</section>\n"


def numbers(items: Iterable[tuple[str, str | None, str]]) -> str:
    """Returns a grid of (name, value, remark); a value of None reads "not recorded"."""
    cells = []
    for name, value, remark in items:
        known = MISSING if value is None else escape(value)
        remark = f"<small>{escape(remark)}</small>" if value is not None else ""
        cells.append(f"<div><dt>{escape(name)}</dt><dd>{known}{remark}</dd></div>\n")
    return f'<dl class="numbers">\n{"".join(cells)}</dl>\n'


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Returns a table of names and values."""
    rows = (
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n'
        for name, value in items
    )
    return f"<table>\n{''.join(rows)}</table>\n"


def escape(text: Any) -> str:
    """Returns text as HTML; what HTML can't hold becomes U+FFFD."""
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text)))


def _variables(column: int) -> str:
    return " ".join(f"--{name}: {both[column]};" for name, both in PALETTE.items())
