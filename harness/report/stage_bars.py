"""What `ssodbench profile` found of training steps, as tables, sentences and stacked bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import msgspec
from matplotlib.figure import Figure
from rich.table import Table

from harness.core.escape import figure_label
from harness.core.files import read_bytes
from harness.engine.profile import ratio_text
from harness.engine.sweep import line_of
from harness.report.figures import STYLE, as_svg

# The loader's stages, then the teacher's, the student's, and what the optimiser needs, each kind in hues of its own.
_COLOURS = {
    "wait": "#e69f00",
    "feed": "#f0b429",
    "hand-over": "#8c6d31",
    "teacher": "#009e73",
    "mixing": "#80cba8",
    "ema": "#2ec99b",
    "forward": "#7cc7f2",
    "student": "#56b4e9",
    "losses": "#58a6ff",
    "backward": "#0072b2",
    "gradients": "#cc79a7",
    "optimizer": "#d55e00",
    "rest": "#8a8a8a",
}
_OTHER = "#4d4d4d"
MEANING = {
    "wait": "the next batch is not ready",
    "feed": "plans, file bytes and draws of later batches are given to the pipeline",
    "hand-over": "rendered images become a batch on the device",
    "teacher": "pseudo labels, and whatever else the teacher says",
    "mixing": "images are mixed with each other",
    "ema": "the teacher follows the student",
    "forward": "what the method does outside of ranges of its own",
    "student": "the student's backbone",
    "losses": "the student's heads, sampling and losses",
    "backward": "",
    "gradients": "zeroing, reduction over micro-batches and devices, clipping",
    "optimizer": "",
    "rest": "learning rate, flags, counters",
}
Bars = dict[str, dict[str, float]]  # name of a bar -> stage -> milliseconds


def ordered(stages: Mapping[str, Any]) -> list[str]:
    """Stages in the order of a step; a method's own ones before the backward."""
    known = list(_COLOURS)
    return sorted(stages, key=lambda name: known.index(name) if name in known else known.index("backward") - 0.5)


def bars_of(found: Mapping[str, Any]) -> Bars:
    """The bars of a profile or of a sweep."""
    if "variants" in found:
        return {line_of(row["settings"]): _means(row["stages_ms"]) for row in found["variants"]}
    what = found["what"]
    return {f"{what['method']}, {what['detector']}, {what['device']}": _means(found["step"]["stages_ms"])}


def _means(stages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: values["mean"] for name, values in stages.items()}


def svg(bars: Bars) -> str:
    """Stacked bars, one above the other: milliseconds of a step by stage."""
    names = ordered(dict.fromkeys(name for bar in bars.values() for name in bar))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.9 + 0.45 * len(bars)), layout="constrained")
        axes = figure.subplots()
        rows, ends = list(range(len(bars))), [0.0] * len(bars)
        for name in names:
            widths = [bar.get(name, 0.0) for bar in bars.values()]
            axes.barh(rows, widths, left=ends, height=0.62, color=_COLOURS.get(name, _OTHER), label=figure_label(name))
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        axes.set_yticks(rows, [figure_label(name) for name in bars])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("milliseconds of a training step")
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=9)
        return as_svg(figure)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """What a terminal shows of a profile, or of a sweep."""
    return [_variants(found["variants"])] if "variants" in found else [_stages(found)]


def _columns(table: Table, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        table.add_column(name, justify="right" if place and name else "left")


def _stages(found: Mapping[str, Any]) -> Table:
    step, what = found["step"], found["what"]
    clock = "time on the GPU" if step["clock"] == "device" else "time of the process"
    table = Table(title=f"a step of {what['method']} ({what['images']} images), {clock}, {step['steps']} steps")
    _columns(table, ("stage", "median ms", "p95 ms", "share", ""))
    for name in ordered(step["stages_ms"]):
        values = step["stages_ms"][name]
        numbers = f"{values['median']:.2f}", f"{values['p95']:.2f}", f"{values['share']:.1%}"
        table.add_row(name, *numbers, MEANING.get(name, "the method's own"))
    table.add_section()
    table.add_row("the step", f"{step['median_ms']:.2f}", f"{step['p95_ms']:.2f}", "", "wall time")
    return table


def _variants(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="settings side by side")
    _columns(table, ("settings", "images/s", "ms", "the best over it"))
    for row in sorted(rows, key=lambda row: -row["images_per_s"]):
        compared = ratio_text(row["best_over_it"]) if "best_over_it" in row else "best"
        table.add_row(line_of(row["settings"]), f"{row['images_per_s']:.1f}", f"{row['ms']:.1f}", compared)
    return table


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in words."""
    return _of_sweep(found) if "variants" in found else _of_step(found)


def _of_step(found: Mapping[str, Any]) -> list[str]:
    step, ceilings, memory = found["step"], found["ceilings"], found["memory"]
    free, alone = ceilings["free_loader"], ceilings["loader_alone"]
    lines = [
        f"{step['images_per_s']:.1f} images/s; {step['data_wait']:.1%} of a step goes to the loader",
        f"with a loader that costs nothing: {free['images_per_s']:.1f} images/s ({free['gain']:.2f} times as many); "
        f"the loader alone: {alone['images_per_s']:.1f} images/s; the slower side is the {ceilings['bottleneck']}",
        f"CPU: {found['cpu']['cores_used']:.2f} of {found['cpu']['cores']} cores; memory at most "
        f"{memory['host_peak_mb'] / 1024:.2f} GiB"
        + (f" + {memory['device_peak_mb'] / 1024:.2f} GiB on the GPU" if memory["device_peak_mb"] is not None else ""),
    ]
    if found["gpu"]:
        lines.append(f"GPU: busy {found['gpu']['utilization']:.0%} of the time")
    if found["energy"]:
        lines.append(f"{found['energy']['watts']:.0f} W, {found['energy']['joules_per_image']:.2f} J per image")
    return lines


def _of_sweep(found: Mapping[str, Any]) -> list[str]:
    lines = [f"fastest on this machine: {found['recommendation']}"]
    if found["same_speed"]:
        lines.append("as fast within the noise: " + "; ".join(found["same_speed"]))
    changing = [key for key in found["changes_result"] if len({str(r["settings"][key]) for r in found["variants"]}) > 1]
    if changing:
        lines.append(
            f"{', '.join(changing)} changes what is computed, not only how fast: runs are comparable within one value"
        )
    return lines


def read(folder: Path, problems: list[str]) -> Bars:
    """The bars of all `profile*.json` that lie in a folder.

    Args:
        folder: of a suite.
        problems: gets a sentence about each file that is no profile.
    """
    bars: Bars = {}
    for path in sorted(folder.glob("profile*.json")):
        try:
            own = bars_of(msgspec.json.decode(read_bytes(path)))
        except (OSError, msgspec.DecodeError, LookupError, TypeError, AttributeError):
            problems.append(f"{path} is no profile of a training step: write one with `ssodbench profile out={path}`")
            continue
        several = {name: bar for name, bar in own.items() if name in bars}
        bars |= {f"{name} ({path.stem})" if name in several else name: bar for name, bar in own.items()}
    return bars
