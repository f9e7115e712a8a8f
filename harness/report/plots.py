"""The report's figures: AP against label ratio, against compute, and against what was published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator

from harness.core.escape import figure_label
from harness.core.readback import read_metrics
from harness.report.collect import UNKNOWN_SHARE
from harness.report.costs import Cost
from harness.report.curves import Curves, learning_curves, pseudo_label_curves
from harness.report.figures import EDGE, STYLE, as_svg, look, row_label, shared_legend
from harness.report.tables import Row, Section, method_label


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
        "learning_curves": learning_curves(section, curves),
        "pseudo_labels": pseudo_label_curves(section, curves),
    }
    return {name: svg for name, svg in figures.items() if svg is not None}


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
        shared_legend(figure, panels)
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
            x, means, spreads, color=colour, marker=marker, markersize=6, capsize=3, lw=1.6, label=row_label(row)
        )
        for at, cell in zip(x, cells, strict=True):
            if cell.n > 1:
                dots = [run.record.ap for run in cell.runs if run.record.ap is not None]
                axes.scatter([at] * len(dots), dots, s=9, color=colour, alpha=0.45, linewidths=0)
    for row in section.reference:
        for cell in row.cells.values():
            if (mean := cell.mean("ap")) is not None:
                axes.axhline(mean, color="#4d4d4d", lw=1.2, ls=(0, (5, 3)), label=f"{row_label(row)}, all labels")
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
        shared_legend(figure, axes.flat)
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
            panel.plot([value], [ap], color=colour, marker=marker, markersize=8, ls="", label=row_label(row))
            front += [(value, ap)] if on_front else []
    if front:
        values, aps = zip(*sorted(front), strict=True)
        panel.plot(values, aps, color=EDGE, lw=1.2, ls=(0, (4, 3)), zorder=1, label="Pareto front")
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
            axes.plot([theirs], [ours], marker=marker, ls="", mec=colour, mfc=face, markersize=7, label=row_label(row))
        most = 1.08 * max(max(theirs, ours) for _, theirs, ours, _ in points)
        axes.plot([0, most], [0, most], color=EDGE, lw=1, ls=(0, (4, 3)))
        axes.set(xlim=(0, most), ylim=(0, most), xlabel="published AP", ylabel="our AP")
        shared_legend(figure, [axes])
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
