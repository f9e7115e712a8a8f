"""Records to one report: report.html, report.md, report.csv, report.tex, report.json.

Reads records (and metrics.jsonl for curves), never logs. Numbers become text in `harness.report.text`.
"""

from __future__ import annotations

import csv
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.core.escape import csv_cell, latex, literal, markdown, plain
from harness.core.files import refusal, require_writable, write_atomically
from harness.core.readback import read_published
from harness.core.record import BASELINE
from harness.core.types import UserError
from harness.report import numbers, plots, stage_bars
from harness.report import text as formatting
from harness.report.comparison import shown_labels
from harness.report.numbers import COSTS, PSEUDO, SCORES
from harness.report.overview import overviews
from harness.report.parts import Part, part_of
from harness.report.tables import Cell, Row, load, method_label
from harness.report.text import cell_text

COCO = "coco"  # the dataset that published numbers are shown beside
TEMPLATES = Path(__file__).parent / "templates"
PUBLISHED = Path(__file__).parents[2] / "results" / "published.csv"


def run(
    folder: Path, out: Path | None = None, resamples: int = 1000, gallery: int = 6, cache_dir: Path | None = None
) -> Path:
    """Writes the report of all records below a folder.

    Args:
        folder: of a suite, or of all runs.
        out: where the report goes, by default `folder/report`.
        resamples: of the evaluation images, for intervals of runs that have matches.npz; 0: none.
        gallery: how many evaluation images to show with truth and boxes, where the data is there; 0: none.
        cache_dir: root of the cache, where resampled scores are kept for the next report; None: they are not.

    Returns:
        Path of report.html.

    Raises:
        UserError: there is no record, or `out` cannot be written.
        RunError: the disk is full, or fails.
    """
    out = folder / "report" if out is None else out
    sections, problems = load(folder)
    parts = [
        part_of(number, section, resamples, gallery, problems, cache_dir=cache_dir)
        for number, section in enumerate(sections, 1)
    ]
    on_coco = [part.section for part in parts if part.section.keys["dataset"] == COCO and not part.section.by_shots]
    lines = published(problems) if on_coco else []
    profiles = stage_bars.read(folder, problems)
    problems = list(dict.fromkeys(problems))
    beside = overviews(sections)
    published_plot = plots.published_against_ours(on_coco, lines) if lines else None
    content = {
        "overviews": beside,
        "parts": parts,
        "published": lines,
        "published_plot": published_plot,
        "profile_plot": stage_bars.svg(profiles) if profiles else None,
        "problems": problems,
        "baseline": method_label(BASELINE),
        "scores": SCORES,
        "published_percents": ("1", "2", "5", "10", "full"),
    }
    require_writable(out, "out", folder=True)
    _set_addresses(parts, out)
    try:
        for name, environment in _templates().items():
            text = environment.get_template(f"{name}.j2").render(content)
            write_atomically(out / name, text.encode())
        write_atomically(out / "report.csv", _csv(summary(parts)))
        write_atomically(out / "report.json", numbers.to_json(parts, lines, problems))
        for part in parts:
            for name, svg in part.section.plots.items():
                write_atomically(out / f"{part.number}_{name}.svg", svg.encode())
        for overview in beside:
            if overview.plot is not None:
                write_atomically(out / f"detectors_{overview.number}.svg", overview.plot.encode())
        if published_plot is not None:
            write_atomically(out / "published.svg", published_plot.encode())
    except OSError as error:
        raise refusal(error, {"out": out}) from error
    return out / "report.html"


def _set_addresses(parts: list[Part], out: Path) -> None:
    """Relative addresses of the records, so that page and records can be moved together."""
    here = out.resolve()
    for part in parts:
        for run in [*part.section.runs, *part.section.missing]:
            if run.file is not None:
                run.href = quote(os.path.relpath(run.file.resolve(), here), errors="surrogateescape")
        for count, (_, cell) in enumerate(formatting.filled(part.section), 1):
            cell.anchor = f"runs{part.number}-{count}"


def summary(parts: list[Part]) -> pd.DataFrame:
    """One row per table, method and label ratio, with numbers as they are: means, standard deviations, n."""
    lines = []
    for part in parts:
        for row in [*part.section.rows, *part.section.reference]:
            for percent, cell in row.cells.items():
                line: dict[str, Any] = {
                    **part.section.keys,
                    "method": row.method,
                    "variant": row.configuration,
                    "labeller": row.labeller,
                    **numbers.amount(part.section, percent),
                }
                line |= {"n": cell.n, "missing": len(cell.missing), "reason": cell.reason}
                for key in SCORES + PSEUDO:
                    line |= {key: cell.mean(key), f"{key}_std": cell.std(key)}
                line |= {"gain": cell.gain, "gain_std": cell.gain_std, "gain_n": len(cell.gains)}
                line |= _compared(part, row, cell)
                line |= {key: cell.mean(key) for key in COSTS}
                lines.append(line)
    return pd.DataFrame(lines)


def _compared(part: Part, row: Row, cell: Cell) -> dict[str, Any]:
    """What the comparison with the baseline adds to a line of report.csv."""
    one, cost = part.analysis.of(row, cell), part.analysis.cost(row, cell)
    runs = one.found.over_runs if one is not None else None
    images = one.found.over_images if one is not None else None
    needed = shown_labels(one) if one is not None else None
    return {
        "gain_low": runs.low if runs is not None else None,
        "gain_high": runs.high if runs is not None else None,
        "p": runs.p if runs is not None else None,
        "p_holm": one.found.p_holm if one is not None else None,
        "gain_low_images": images.low if images is not None else None,
        "gain_high_images": images.high if images is not None else None,
        "labels_needed": needed.statement if needed is not None else None,
        "images_seen": cost.images if cost is not None else None,
        "device_hours": cost.device_hours if cost is not None else None,
        "front": formatting.front(cost),
    }


def _csv(frame: pd.DataFrame) -> bytes:
    """The table as CSV; names that a spreadsheet would take for a formula are told apart."""
    harmless = frame.map(lambda value: csv_cell(value) if isinstance(value, str) else value)
    has_return = harmless.map(lambda value: isinstance(value, str) and "\r" in value).to_numpy().any()
    # Before Python 3.13 the csv module does not quote a text for its carriage returns.
    quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL
    return harmless.to_csv(index=False, lineterminator="\n", quoting=quoting).encode()


def published(problems: list[str]) -> list[dict[str, Any]]:
    """Published COCO numbers, one dict per source: its six comparability columns and `values`, percent -> its row.

    Args:
        problems: gets a sentence where the file is damaged; there are no published numbers then.
    """
    try:
        lines = read_published(PUBLISHED)
    except UserError as error:
        problems.append(str(error))
        return []
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        rows.setdefault(line["method"], {**line, "values": {}})["values"][line["percent"]] = line
    return list(rows.values())


def show(folder: Path, console: Console) -> None:
    """Prints the tables of all records below a folder."""

    def text(value: object, style: str = "") -> Text:
        shown = literal(value, console.encoding)
        shown.stylize(style)
        return shown

    for number, section in enumerate(load(folder)[0], 1):
        part = part_of(number, section, 0, 0, [], draw=False)
        title = text(section.title, "bold") + text(": COCO AP, mean ± standard deviation (n runs)")
        console.print(Text("\n") + title, soft_wrap=True)
        table = Table()
        table.add_column("method")
        for percent in section.percents:
            table.add_column(text(section.column(percent)), justify="right")
        for row in section.rows:
            table.add_row(text(row.label), *(text(cell_text(row.cells[percent])) for percent in section.percents))
        for row in section.reference:
            for cell in row.cells.values():
                empty = [""] * (len(section.percents) - 1)
                table.add_row(text(f"{row.label}, all labels"), text(cell_text(cell)), *empty)
        console.print(table)
        console.print(f"in brackets: difference to {method_label(BASELINE).lower()}, paired", style="dim")
        for sentence in part.analysis.verdict or [part.no_verdict]:
            console.print(text(sentence))
        for run in section.missing:
            console.print(text(f"- {run.record.cell}: {run.record.status}: {run.record.error}"))


@functools.cache
def _templates() -> dict[str, Environment]:
    """File -> how it is rendered: all that a template puts in is escaped for its form, by jinja itself for HTML."""
    escapes: dict[str, Callable[[Any], Any]] = {"report.html": _seen, "report.md": markdown, "report.tex": latex}
    return {name: _environment(finalize, name.endswith(".html")) for name, finalize in escapes.items()}


def _seen(value: Any) -> Any:
    return plain(value) if type(value) is str else value  # what is Markup is left alone


def _environment(finalize: Callable[[Any], Any], autoescape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    public = {name: function for name, function in vars(formatting).items() if inspect.isfunction(function)}
    environment.filters |= {name: function for name, function in public.items() if not name.startswith("_")}
    return environment
