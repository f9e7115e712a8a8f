"""The report's figures, as SVG: mAP against label ratio, learning curves, quality of the pseudo labels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator

from harness.core.escape import figure_label
from harness.core.readback import EvalLine, Line, PseudoLine, TrainLine, read_metrics
from harness.report.collect import UNKNOWN_SHARE, Run
from harness.report.costs import Cost
from harness.report.tables import Row, Section, method_label

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
Curves = dict[Path | None, list[Line]]  # run folder -> lines of its metrics.jsonl
_STYLES = ("-", "--", ":", "-.")
_INK, _PAPER, _GRID, _EDGE = "#1f2329", "#fffffe", "#e4e4e4", "#8a8a8a"
# What each colour becomes where the reader has asked for a dark scheme; all have a contrast of 4.5 or more to #0d1117.
_DARK = {
    _INK: "#e6edf3",
    _PAPER: "#0d1117",
    _GRID: "#2a3038",
    _EDGE: "#8a8a8a",
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
    "axes.edgecolor": _EDGE,
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


def draw(section: Section, problems: list[str] | None = None) -> dict[str, str]:
    """Figures of a section, name -> SVG; a figure that would be empty is left out.

    Args:
        section: whose runs are drawn.
        problems: gets a sentence about each metrics.jsonl that is damaged.
    """
    curves: Curves = {}
    for run in section.runs:
        if run.folder is not None:
            metrics = read_metrics(run.folder)
            curves[run.folder] = metrics.lines
            if problems is not None and metrics.problem:
                problems.append(metrics.problem)
    figures = {
        "ap_by_ratio": ap_by_ratio([section]),
        "learning_curves": _learning_curves(section, curves),
        "pseudo_labels": _pseudo_labels(section, curves),
    }
    return {name: svg for name, svg in figures.items() if svg is not None}


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


def _label(row: Row) -> str:
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


def ap_by_ratio(sections: Sequence[Section]) -> str | None:
    """Mean AP with its standard deviation against the percentage of labels, every run as a dot; a panel for each table.

    None where no table has a run of a known share of labels.
    """
    found = [(section, [percent for percent in section.percents if percent != UNKNOWN_SHARE]) for section in sections]
    shown = [(s, percents) for s, percents in found if any(row.cells[p].n for row in s.rows for p in percents)]
    if not shown:
        return None
    width = 6.4 if len(shown) == 1 else 2.0 + 3.1 * len(shown)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 4.0), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, (section, percents) in zip(panels, shown, strict=True):
            _ratio_panel(axes, section, percents)
            if len(shown) > 1:
                axes.set_title(figure_label(section.detector))
        panels[0].set_ylabel("AP (COCO, 0.50:0.95)")
        panels[0].set_ylim(0, 1.04 * panels[0].get_ylim()[1])  # room for the highest marker
        _legend(figure, panels)
        return as_svg(figure)


def _ratio_panel(axes: Axes, section: Section, percents: Sequence[float]) -> None:
    looks = look(section.rows)
    rows = [row for row in section.rows if any(row.cells[percent].n for percent in percents)]
    for number, row in enumerate(rows):
        colour, marker = looks[row.label]
        cells = [row.cells[percent] for percent in percents if row.cells[percent].n]
        # Rows stand a little beside each other, so that their spreads do not hide one another.
        x = [cell.percent * 1.035 ** (number - (len(rows) - 1) / 2) for cell in cells]
        means = [cell.mean("ap") or 0.0 for cell in cells]
        spreads = [cell.std("ap") or 0.0 for cell in cells]
        axes.errorbar(
            x, means, spreads, color=colour, marker=marker, markersize=6, capsize=3, lw=1.6, label=_label(row)
        )
        for at, cell in zip(x, cells, strict=True):
            if cell.n > 1:
                dots = [run.record.ap for run in cell.runs if run.record.ap is not None]
                axes.scatter([at] * len(dots), dots, s=9, color=colour, alpha=0.45, linewidths=0)
    for row in section.reference:
        for cell in row.cells.values():
            if (mean := cell.mean("ap")) is not None:
                axes.axhline(mean, color="#4d4d4d", lw=1.2, ls=(0, (5, 3)), label=f"{_label(row)}, all labels")
    axes.set_xscale("log")
    axes.set_xticks(percents, [figure_label(section.column(percent)) for percent in percents])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(percents[0] / 1.4, percents[-1] * 1.4)
    axes.set_xlabel("labelled images")


# How compute is counted: axis label -> (value of a cost, whether it is on that front).
_COMPUTE: dict[str, Callable[[Cost], tuple[float | None, bool]]] = {
    "images seen": lambda cost: (cost.images, cost.front_by_images),
    "device hours": lambda cost: (cost.device_hours, cost.front_by_hours),
}


def ap_by_compute(section: Section, found: dict[tuple[str, float], Cost]) -> str | None:
    """Mean AP against images seen and device hours, stage 1 included, a column of panels for each share of labels.

    None where no share of labels has two cells to compare.
    """
    percents = [percent for percent in section.percents if sum(key[1] == percent for key in found) > 1]
    kinds = [name for name, read in _COMPUTE.items() if len({read(cost)[0] for cost in found.values()} - {None}) > 1]
    if not percents or not kinds:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.6 * len(percents), 0.3 + 2.4 * len(kinds)), layout="constrained")
        axes = figure.subplots(len(kinds), len(percents), squeeze=False, sharex="row", sharey=True)
        for line, name in enumerate(kinds):
            axes[line][0].set_ylabel("AP (COCO, 0.50:0.95)")
            for panel, percent in zip(axes[line], percents, strict=True):
                if line == 0:
                    panel.set_title(f"{figure_label(section.column(percent))}{'' if section.by_shots else ' labels'}")
                panel.set_xlabel(f"{name}, stage 1 included")
                _compute_panel(panel, section, percent, found, _COMPUTE[name])
                if name == "images seen":
                    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(figure, axes.flat)
        return as_svg(figure)


def _compute_panel(
    panel: Axes,
    section: Section,
    percent: float,
    found: dict[tuple[str, float], Cost],
    read: Callable[[Cost], tuple[float | None, bool]],
) -> None:
    looks, front = look(section.rows), []
    for row in section.rows:
        cost, ap = found.get((row.label, percent)), row.cells[percent].mean("ap")
        value, on_front = read(cost) if cost is not None else (None, False)
        if value is not None and ap is not None:
            colour, marker = looks[row.label]
            panel.plot([value], [ap], color=colour, marker=marker, markersize=8, ls="", label=_label(row))
            front += [(value, ap)] if on_front else []
    if front:
        values, aps = zip(*sorted(front), strict=True)
        panel.plot(values, aps, color=_EDGE, lw=1.2, ls=(0, (4, 3)), zorder=1, label="Pareto front")
    panel.margins(x=0.15, y=0.15)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(4))


def published_against_ours(sections: list[Section], published: list[dict[str, Any]]) -> str | None:
    """Our mean AP against published AP of the same method and share of labels; None where we have no such pair."""
    points = list(published_pairs(sections, published))
    if not points:
        return None
    looks = look({row.label: row for section in sections for row in section.rows}.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for row, theirs, ours, alike in points:
            colour, marker = looks[row.label]
            face = colour if alike else "none"
            axes.plot([theirs], [ours], marker=marker, ls="", mec=colour, mfc=face, markersize=7, label=_label(row))
        most = 1.08 * max(max(theirs, ours) for _, theirs, ours, _ in points)
        axes.plot([0, most], [0, most], color=_EDGE, lw=1, ls=(0, (4, 3)))
        axes.set(xlim=(0, most), ylim=(0, most), xlabel="published AP", ylabel="our AP")
        _legend(figure, [axes])
        return as_svg(figure)


def published_pairs(
    sections: list[Section], published: list[dict[str, Any]]
) -> Iterator[tuple[Row, float, float, bool]]:
    """(row, published AP, our mean AP, whether the split protocol is the same) where method and share of labels agree.

    A published method is ours if its name is ours, or begins with it and goes on with a bracket or a comma, and if its
    backbone has our depth, by which the names of detectors end (faster_rcnn_r50). None is ours with the pseudo labels
    of somebody else.
    """
    for section in [section for section in sections if not section.by_shots]:
        depth = str(section.keys["detector"]).rpartition("_")[2].upper()
        for row in [row for row in [*section.rows, *section.reference] if not row.labeller]:
            for source in published:
                name, ours = source["method"].lower(), method_label(row.method).lower()
                if name != ours and not name.startswith((f"{ours} (", f"{ours},")):
                    continue
                for percent, line in source["values"].items():
                    cell = row.cells.get(100.0 if percent == "full" else float(percent))
                    ap = cell.mean("ap") if cell is not None else None
                    if ap is not None and line["backbone"].startswith(f"{depth} "):
                        yield row, float(line["ap"]), ap, line["protocol"] == section.keys["protocol"]


def _panels(count: int, rows: int, figure: Figure) -> Any:
    return figure.subplots(rows, count, squeeze=False, sharex=True, sharey="row")


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend for all panels, each name once, to the right of them."""
    names: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            names.setdefault(label, handle)
    if names:
        figure.legend(names.values(), names.keys(), loc="outside right upper")


def _runs_by(section: Section, percent: float) -> list[tuple[Row, list[Run]]]:
    return [(row, row.cells[percent].runs) for row in section.rows if row.cells[percent].runs]


def _mean_curve(points: list[pd.Series[float]]) -> pd.Series[float]:
    """Mean over runs at the steps that all of them have."""
    return pd.concat(points, axis=1, join="inner").mean(axis=1).sort_index()


def _learning_curves(section: Section, curves: Curves) -> str | None:
    """AP over training where it was measured during training, and the training loss."""
    percents = [percent for percent in section.percents if _runs_by(section, percent)]
    reported = {run.folder: run.record.reported_network for run in section.runs}
    scored = {folder: eval_curve(lines, reported[folder]) for folder, lines in curves.items()}
    losses = {folder: loss_curve(lines) for folder, lines in curves.items()}
    kinds = [("AP", scored)] if any(len(curve) > 1 for curve in scored.values()) else []
    kinds += [("training loss", losses)] if any(len(curve) > 1 for curve in losses.values()) else []
    if not percents or not kinds:
        return None
    looks = look(section.rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.6 * len(percents), 0.4 + 2.3 * len(kinds)), layout="constrained")
        axes = _panels(len(percents), len(kinds), figure)
        for column, percent in enumerate(percents):
            axes[0][column].set_title(f"{figure_label(section.column(percent))}{'' if section.by_shots else ' labels'}")
            axes[-1][column].set_xlabel("student step")
            for line, (name, found) in enumerate(kinds):
                panel = axes[line][column]
                if column == 0:
                    panel.set_ylabel(name)
                for row, runs in _runs_by(section, percent):
                    colour, marker = looks[row.label]
                    points = [
                        curve for run in runs if len(curve := found.get(run.folder, pd.Series(dtype="float64"))) > 1
                    ]
                    if points:
                        mark = {"marker": marker, "markersize": 4} if name == "AP" else {}
                        mean = _mean_curve(points)
                        panel.plot(mean.index, mean, color=colour, lw=1.6, label=_label(row), **mark)
                        for one in points if len(points) > 1 else []:
                            panel.plot(one.index, one, color=colour, lw=0.7, alpha=0.35)
        for panel in axes.flat:
            panel.set_ylim(bottom=0)
        _legend(figure, axes.flat)
        return as_svg(figure)


def _pseudo_labels(section: Section, curves: Curves) -> str | None:
    """Precision, recall and IoU of the pseudo labels over training, one row of panels per label ratio."""
    measures = ("precision", "recall", "iou")
    quality = {folder: {m: pseudo_curves(lines, m) for m in measures} for folder, lines in curves.items()}
    measured = {run.folder for run in section.runs if run.record.pseudo_precision is not None}
    measured |= {folder for folder, found in quality.items() if found["precision"]}
    percents = [
        percent
        for percent in section.percents
        if any(run.folder in measured for _, runs in _runs_by(section, percent) for run in runs)
    ]
    if not percents:
        return None
    looks = look(section.rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 0.5 + 2.1 * len(percents)), layout="constrained")
        axes = figure.subplots(len(percents), len(measures), squeeze=False, sharex=True, sharey=True)
        for line, percent in enumerate(percents):
            axes[line][0].set_ylabel(f"{figure_label(section.column(percent))}{'' if section.by_shots else ' labels'}")
            for column, measure in enumerate(measures):
                panel = axes[line][column]
                panel.set_ylim(0, 1.02)
                if line == 0:
                    panel.set_title({"iou": "mean IoU"}.get(measure, measure))
                if line == len(percents) - 1:
                    panel.set_xlabel("student step")
                for row, runs in _runs_by(section, percent):
                    colour = looks[row.label][0]
                    cells = [quality[run.folder][measure] for run in runs if run.folder in quality]
                    names = list(dict.fromkeys(name for cell in cells for name in cell))
                    for style, name in zip(_STYLES * 3, names, strict=False):
                        mean = _mean_curve([cell[name] for cell in cells if name in cell])
                        mark = "o" if len(mean) == 1 else None
                        label = f"{_label(row)}: {figure_label(name)}"
                        panel.plot(mean.index, mean, color=colour, ls=style, lw=1.5, marker=mark, label=label)
                    if not names:
                        level = row.cells[percent].mean(f"pseudo_{measure}")
                        if level is not None:
                            panel.axhline(
                                level, color=colour, lw=1.5, label=f"{_label(row)}: made once, before training"
                            )
        _legend(figure, axes.flat)
        return as_svg(figure)


def eval_curve(lines: list[Line], network: str) -> pd.Series[float]:
    """AP of a network, by the number of student steps done."""
    found = {
        line.step + 1: line.metrics.get("ap")
        for line in lines
        if isinstance(line, EvalLine) and line.network == network
    }
    return pd.Series(found, dtype="float64").dropna()


def loss_curve(lines: list[Line]) -> pd.Series[float]:
    """The training loss by student step, as a running mean over a twentieth of the run."""
    found = {line.step + 1: line.loss for line in lines if isinstance(line, TrainLine)}
    return _running_mean(pd.Series(found, dtype="float64").dropna())


def pseudo_curves(lines: list[Line], measure: str) -> dict[str, pd.Series[float]]:
    """Threshold set -> a measure of pseudo-label quality by student step, as a running mean."""
    points: dict[str, dict[int, Any]] = {}
    for line in lines:
        if isinstance(line, PseudoLine):
            for name, part in line.quality.items():
                # Without a pseudo label there is recall (0), but neither precision nor IoU.
                empty = measure != "recall" and part.get("labels") == 0
                points.setdefault(name, {})[line.step + 1] = None if empty else part.get(measure)
    curves = {name: pd.Series(found, dtype="float64").dropna() for name, found in points.items()}
    return {name: _running_mean(curve) for name, curve in curves.items() if len(curve)}


def _running_mean(curve: pd.Series[float]) -> pd.Series[float]:
    return curve.rolling(max(1, len(curve) // 20), min_periods=1, center=True).mean()
