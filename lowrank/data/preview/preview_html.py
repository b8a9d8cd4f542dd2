"""A preview as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lowrank.data.preview.gathered import Preview, Shown
from lowrank.data.preview.pack_tree import Branch
from lowrank.data.preview.token_text import Piece, visible

STYLE = """
:root { color-scheme: light dark; --yes: #b7efc5; --yes2: #92e6a7; --no: #777; --line: #8885; }
@media (prefers-color-scheme: dark) { :root { --yes: #14532d; --yes2: #166534; --no: #999; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.example { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 6px; padding: .7rem; margin: 0 0 1rem; }
.pack .example { border-left: 4px solid #2a9; }
.example span { color: var(--no); border-left: 1px dotted var(--line); }
.example .on { color: inherit; background: var(--yes); } .example .on:nth-child(even) { background: var(--yes2); }
.example i { opacity: .6; font-style: normal; }
h2 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
td { padding: .1rem 1rem .1rem 0; } td:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: var(--yes2); height: .8rem; min-width: 1px; } .bars td:last-child { width: 30rem; }
""".strip()


def preview_html(preview: Preview, title: str = "What is trained on") -> str:
    """The preview as a page."""
    named = ((shown, f"{preview.kind} {number}") for number, shown in enumerate(preview.shown, start=1))
    examples = "\n".join(_example(shown, name) for shown, name in named)
    more = f"<p>... and {preview.left_out} more</p>" if preview.left_out else ""
    items = "".join(f"<li>{escape(reason)}</li>" for reason in preview.reasons)
    reasons = f"<h2>Rows left out</h2>\n<ul>{items}</ul>\n" if items else ""
    figures = "\n".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in preview.figures)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
{STYLE}
</style></head><body>
<h1>{escape(title)}</h1>
<table>
{figures}
</table>
{reasons}<h2>Example lengths in tokens</h2>
{_bars(preview)}
{_tree(preview)}<h2>{escape(preview.heading)}, token by token</h2>
<p class="example"><span class="on">supervised</span> <span>context only</span></p>
<div class="{"pack" if preview.packed else "rows"}">
{examples}
</div>
{more}
</body></html>
"""


def _example(shown: Shown, name: str) -> str:
    tokens = "".join(_token(piece) for piece in shown.pieces)
    heading = f"{name}: {shown.place}, {shown.tokens} tokens, {shown.supervised} supervised"
    return f'<h2>{escape(heading)}</h2>\n<div class="example">{tokens}</div>'


def _tree(preview: Preview) -> str:
    """What the pack's examples begin with in common, and where they part."""
    if not preview.tree:
        return ""
    return f"<h2>{escape(preview.heading)}, as a tree</h2>\n{_list(preview.tree)}\n"


def _list(branches: Sequence[Branch]) -> str:
    items = (
        f"<li>{escape(branch.told)}{_list(branch.branches) if branch.branches else ''}</li>" for branch in branches
    )
    return f"<ul>{''.join(items)}</ul>"


def _token(piece: Piece) -> str:
    text = escape(visible(piece.text)).replace("\n", "<i>↵</i>\n")
    return f'<span class="on">{text}</span>' if piece.supervised else f"<span>{text}</span>"


def _bars(preview: Preview) -> str:
    most = max((count for _, _, count in preview.histogram), default=1)
    rows = (
        f'<tr><td>{begin:,} - {end:,}</td><td>{count:,}</td><td><div class="bar" style="width:{count / most:.1%}">'
        "</div></td></tr>"
        for begin, end, count in preview.histogram
    )
    return '<table class="bars">\n' + "\n".join(rows) + "\n</table>"
