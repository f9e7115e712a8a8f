"""The report's figures over training: learning curves, and the quality of the pseudo labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from harness.core.escape import figure_label
from harness.core.readback import EvalLine, Line, PseudoLine, TrainLine
from harness.report.collect import Run
from harness.report.figures import STYLE, as_svg, look, row_label, shared_legend
from harness.report.tables import Row, Section

Curves = dict[Path | None, list[Line]]  # run folder -> lines of its metrics.jsonl
_STYLES = ("-", "--", ":", "-.")


def learning_curves(section: Section, curves: Curves) -> str | None:
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
                        panel.plot(mean.index, mean, color=colour, lw=1.6, label=row_label(row), **mark)
                        for one in points if len(points) > 1 else []:
                            panel.plot(one.index, one, color=colour, lw=0.7, alpha=0.35)
        for panel in axes.flat:
            panel.set_ylim(bottom=0)
        shared_legend(figure, axes.flat)
        return as_svg(figure)


def pseudo_label_curves(section: Section, curves: Curves) -> str | None:
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
                        label = f"{row_label(row)}: {figure_label(name)}"
                        panel.plot(mean.index, mean, color=colour, ls=style, lw=1.5, marker=mark, label=label)
                    if not names:
                        level = row.cells[percent].mean(f"pseudo_{measure}")
                        if level is not None:
                            panel.axhline(
                                level, color=colour, lw=1.5, label=f"{row_label(row)}: made once, before training"
                            )
        shared_legend(figure, axes.flat)
        return as_svg(figure)


def _panels(count: int, rows: int, figure: Figure) -> Any:
    return figure.subplots(rows, count, squeeze=False, sharex=True, sharey="row")


def _runs_by(section: Section, percent: float) -> list[tuple[Row, list[Run]]]:
    return [(row, row.cells[percent].runs) for row in section.rows if row.cells[percent].runs]


def _mean_curve(points: list[pd.Series[float]]) -> pd.Series[float]:
    """Mean over runs at the steps that all of them have."""
    return pd.concat(points, axis=1, join="inner").mean(axis=1).sort_index()


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
