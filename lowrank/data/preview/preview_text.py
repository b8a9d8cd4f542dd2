"""A preview drawn for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from lowrank.data.preview.gathered import Preview, Shown
from lowrank.data.preview.token_text import Piece, visible

# Neighbouring tokens differ a little, so that their borders can be seen.
SUPERVISED = ("bold black on green", "bold black on bright_green")
CONTEXT = ("dim", "dim underline")
BAR = 40


def preview_text(preview: Preview) -> RenderableType:
    """The preview as something that a rich console prints."""
    parts: list[RenderableType] = []
    if preview.tree:
        parts += [_tree(preview), Rule(style="dim")]
    parts += [Text(f"{preview.heading}, token by token", style="bold"), _legend()]
    for number, shown in enumerate(preview.shown, start=1):
        parts += [_border(shown, f"{preview.kind} {number}"), _example_text(shown.pieces)]
    if preview.left_out:
        parts.append(Text(f"... and {preview.left_out} more", style="dim"))
    parts += [
        Rule(style="dim"),
        _table(preview),
        *_reasons(preview),
        Text("example lengths in tokens", style="bold"),
        _bars(preview),
    ]
    return Group(*parts)


def _example_text(pieces: list[Piece]) -> Text:
    """One example in colours; line breaks are kept and marked."""
    text = Text()
    for number, piece in enumerate(pieces):
        style = (SUPERVISED if piece.supervised else CONTEXT)[number % 2]
        for at, line in enumerate(visible(piece.text).split("\n")):
            if at:
                text.append("↵", style=style)
                text.append("\n")
            text.append(line, style=style)
    return text


def _tree(preview: Preview) -> Tree:
    """What the pack's examples begin with in common, and where they part."""
    drawn = Tree(Text(f"{preview.heading}, as a tree", style="bold"))
    waiting = [(drawn, branch) for branch in reversed(preview.tree)]
    while waiting:
        under, branch = waiting.pop()
        node = under.add(Text(branch.told))
        waiting += [(node, child) for child in reversed(branch.branches)]
    return drawn


def _legend() -> Text:
    return Text.assemble(("supervised", SUPERVISED[0]), "  ", ("context only", CONTEXT[0]))


def _border(shown: Shown, name: str) -> Rule:
    title = f"{name}: {shown.place}, {shown.tokens} tokens, {shown.supervised} supervised"
    return Rule(Text(title), style="cyan", align="left")


def _table(preview: Preview) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for label, value in preview.figures:
        table.add_row(label, value)
    return table


def _reasons(preview: Preview) -> list[RenderableType]:
    return [Text("rows left out", style="bold"), *map(Text, preview.reasons)] if preview.reasons else []


def _bars(preview: Preview) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    most = max((count for _, _, count in preview.histogram), default=1)
    for begin, end, count in preview.histogram:
        table.add_row(Text(f"{begin:,} - {end:,}", justify="right"), "█" * round(BAR * count / most), f"{count:,}")
    return table
