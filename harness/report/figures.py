"""How the report's figures look: colours and markers of methods, light and dark scheme, legend, SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.core.escape import figure_label
from harness.report.tables import Row

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers repeat the distinction. A method keeps its
# colour in every figure and report.
_KNOWN = {
    "supervised": ("#4d4d4d", "o"),
    "stac": ("#0072b2", "s"),
    "soft_teacher": ("#d55e00", "D"),
    "unbiased_teacher": ("#cc79a7", "^"),
    "mean_teacher": ("#009e73", "v"),
    "dense_teacher": ("#8f5fbf", "<"),
    "arsl": ("#a50026", ">"),
    "mixpl": ("#8c6d31", "*"),
    "consistent_teacher": ("#56b4e9", "X"),
}
_OTHERS = (("#e69f00", "P"), ("#882255", "p"), ("#44aa99", "h"))
_INK, _PAPER, _GRID, EDGE = "#1f2329", "#fffffe", "#e4e4e4", "#8a8a8a"
# What each colour becomes where the reader has asked for a dark scheme; all have a contrast of 4.5 or more to #0d1117.
_DARK = {
    _INK: "#e6edf3",
    _PAPER: "#0d1117",
    _GRID: "#2a3038",
    EDGE: "#8a8a8a",
    "#4d4d4d": "#c9d1d9",
    "#0072b2": "#58a6ff",
    "#d55e00": "#ff8c42",
    "#cc79a7": "#e39ac4",
    "#009e73": "#2ec99b",
    "#8f5fbf": "#b794f6",
    "#a50026": "#ff6b7f",
    "#e69f00": "#f0b429",
    "#882255": "#d96fa8",
    "#44aa99": "#5fd0bd",
    "#56b4e9": "#7cc7f2",
    "#8c6d31": "#c9a227",
}
STYLE: Any = {
    "svg.hashsalt": "ssodbench",  # the same records give the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "axes.edgecolor": EDGE,
    "axes.facecolor": "none",
    "figure.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def look(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each row, by its label."""
    looks, spare = {}, 0
    taken: set[str] = set()
    for row in rows:
        if row.method in _KNOWN and row.method not in taken and not row.labeller:
            looks[row.label] = _KNOWN[row.method]
            taken.add(row.method)
        else:
            looks[row.label] = _OTHERS[spare % len(_OTHERS)]
            spare += 1
    return looks


def row_label(row: Row) -> str:
    """The label of a row as matplotlib takes it."""
    return figure_label(row.label)


def as_svg(figure: Figure) -> str:
    """The figure as SVG whose colours follow the page's scheme, the same text for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names whose letters the font has not: a box stands for each
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _for_both_schemes(buffer.getvalue().decode())


def _for_both_schemes(svg: str) -> str:
    """Colours as variables, which a style sheet within the file sets for the light and the dark scheme."""
    for colour in _DARK:
        svg = svg.replace(f": {colour}", f": var(--{colour[1:]})")
    light, dark = (
        "".join(f"--{colour[1:]}:{value};" for colour, value in scheme.items())
        for scheme in ({colour: colour for colour in _DARK}, _DARK)
    )
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    head = svg.index(">", svg.index("<svg ")) + 1
    return svg[:head] + style + svg[head:]


def shared_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend for all panels, each name once, to the right of them."""
    names: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            names.setdefault(label, handle)
    if names:
        figure.legend(names.values(), names.keys(), loc="outside right upper")
