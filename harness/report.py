"""Records to one report: report.html, report.md, report.csv, report.tex.

Reads records (and metrics.jsonl for curves), never logs. Numbers become text in `harness.formatting`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from harness import formatting, plots
from harness.files import refusal, require_writable, write_atomically
from harness.formatting import cell_text
from harness.tables import BASELINE, Section, load, method_label

TEMPLATES = Path(__file__).parent / "templates"
PUBLISHED = Path(__file__).parent.parent / "results" / "published.csv"
SCORES = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
COSTS = (
    "images_per_s",
    "data_stall",
    "wall_seconds",
    "train_seconds",
    "eval_seconds",
    "steps",
    "extra_steps",
    "images_labeled",
    "images_unlabeled",
    "labeled_images",
    "labeled_boxes",
    "peak_memory_mb",
    "peak_gpu_memory_mb",
)
PSEUDO = ("pseudo_precision", "pseudo_recall", "pseudo_iou")


def run(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of all records below a folder.

    Args:
        folder: of a suite, or of all runs.
        out: where the report goes, by default `folder/report`.

    Returns:
        Path of report.html.

    Raises:
        UserError: there is no record, or `out` cannot be written.
        RunError: the disk is full, or fails.
    """
    out = folder / "report" if out is None else out
    sections, problems = load(folder)
    for section in sections:
        section.plots = plots.draw(section, problems)
    content = {
        "sections": sections,
        "problems": problems,
        "published": published(),
        "baseline": method_label(BASELINE),
        "scores": SCORES,
        "published_percents": ("1", "2", "5", "10", "full"),
    }
    environment = _templates()
    require_writable(out, "out", folder=True)
    try:
        for name in ("report.html", "report.md", "report.tex"):
            text = environment.get_template(f"{name}.j2").render(content)
            write_atomically(out / name, text.encode())
        write_atomically(out / "report.csv", summary(sections).to_csv(index=False, lineterminator="\n").encode())
        for number, section in enumerate(sections, 1):
            for name, svg in section.plots.items():
                write_atomically(out / f"{number}_{name}.svg", svg.encode())
    except OSError as error:
        raise refusal(error, {"out": out}) from error
    return out / "report.html"


def summary(sections: list[Section]) -> pd.DataFrame:
    """One row per table, method and label ratio, with numbers as they are: means, standard deviations, n."""
    lines = []
    for section in sections:
        for row in [*section.rows, *section.reference]:
            for percent, cell in row.cells.items():
                line: dict[str, Any] = {
                    **section.keys,
                    "method": row.method,
                    "variant": row.variant,
                    "percent": percent,
                }
                line |= {"n": cell.n, "missing": len(cell.missing), "reason": cell.reason}
                for key in SCORES + PSEUDO:
                    line |= {key: cell.mean(key), f"{key}_std": cell.std(key)}
                line |= {"gain": cell.gain, "gain_std": cell.gain_std, "gain_n": len(cell.gains)}
                line |= {key: cell.mean(key) for key in COSTS}
                lines.append(line)
    return pd.DataFrame(lines)


def published() -> list[dict[str, Any]]:
    """Published COCO numbers, one dict per source: its six comparability columns and `values`, percent -> its row."""
    frame = pd.read_csv(PUBLISHED, dtype=str, keep_default_na=False)
    rows = []
    for _, part in frame.groupby("method", sort=False):
        first: dict[str, Any] = {str(key): value for key, value in part.iloc[0].items()}
        first["values"] = {line["percent"]: line for line in part.to_dict("records")}
        rows.append(first)
    return rows


def show(folder: Path, console: Console) -> None:
    """Prints the tables of all records below a folder."""
    for section in load(folder)[0]:
        console.print(
            f"\n[bold]{section.title}[/]: COCO AP, mean ± standard deviation (n runs)", highlight=False, soft_wrap=True
        )
        table = Table()
        table.add_column("method")
        for percent in section.percents:
            table.add_column(f"{percent:g} %", justify="right")
        for row in section.rows:
            table.add_row(row.label, *(cell_text(row.cells[percent]) for percent in section.percents))
        for row in section.reference:
            for cell in row.cells.values():
                table.add_row(f"{row.label}, all labels", cell_text(cell), *[""] * (len(section.percents) - 1))
        console.print(table)
        console.print(f"in brackets: difference to {method_label(BASELINE).lower()}, paired", style="dim")
        for run in section.missing:
            console.print(
                f"- {run.record.cell}: {run.record.status}: {run.record.error}", markup=False, highlight=False
            )


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    public = {name: function for name, function in vars(formatting).items() if inspect.isfunction(function)}
    environment.filters |= {name: function for name, function in public.items() if not name.startswith("_")}
    return environment
