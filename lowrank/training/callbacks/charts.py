"""Curves over the steps of a run, as SVG that stands inside a page of either colour scheme."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

_COLOURS = ("#4c8bf5", "#f2994a", "#3aa76d", "#c65bcf", "#d9534f", "#1fa6b8", "#a5832f", "#7a6ff0")
_CHROME = "#8a9199"  # readable on white and on near black; the page's style gives texts its own colour
_LABELLED = 12  # points; more values would stand on one another
_MARGINS = {"left": 0.125, "right": 0.985, "bottom": 0.185, "top": 0.93}  # given: to measure them is to draw twice
_SMOOTH_FROM = 30  # with fewer points the line itself is clear


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        name: In the legend; empty for none.
        steps: Where.
        values: What.
        noisy: Drawn faintly, with its moving average over it.
        points: Drawn as points, each with its value, and joined.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    noisy: bool = True
    points: bool = False


def chart(curves: Sequence[Curve], *, from_zero: bool = False, labelled: bool = True, over: str = "step") -> str:
    """An SVG element of lines over steps, or over something else on a logarithmic scale.

    Args:
        curves: At most eight.
        from_zero: Whether the vertical axis begins at 0.
        labelled: Whether points stand beside their values.
        over: What they are lines over.
    """
    import matplotlib
    from matplotlib.figure import Figure

    chrome = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), _CHROME)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowrank", "font.size": 9, **chrome}):
        figure = Figure(figsize=(5.6, 2.5))
        axes = figure.add_subplot()
        figure.subplots_adjust(**_MARGINS)
        for colour, curve in zip(_COLOURS, curves, strict=False):
            smooth = curve.noisy and not curve.points and len(curve.values) >= _SMOOTH_FROM
            label = curve.name or None
            if smooth:
                axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.35)
            values = smoothed(curve.values) if smooth else curve.values
            marker = "o" if curve.points or len(curve.values) == 1 else ""
            axes.plot(curve.steps, values, color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)
            if labelled and curve.points and len(curve.values) <= _LABELLED:
                for step, value in zip(curve.steps, curve.values, strict=True):
                    axes.annotate(f"{value:.3g}", (step, value), (0, 5), textcoords="offset points", ha="center")
        axes.set_xlabel(over)
        if over != "step":
            axes.set_xscale("log")
        axes.grid(color=_CHROME, alpha=0.2, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if from_zero:
            axes.set_ylim(bottom=0)
        if any(curve.name for curve in curves):
            axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, its start corrected (as Adam's)."""
    average, out = 0.0, []
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out
