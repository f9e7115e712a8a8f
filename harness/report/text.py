"""Numbers to text: what the report's templates and the suite's table say. Records hold numbers, text is made here.

Text that comes from outside is escaped in `harness.core.escape`.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

from harness.core.types import RunRecord
from harness.report.bootstrap import ImageInterval
from harness.report.comparison import Compared, shown_labels
from harness.report.costs import Cost
from harness.report.statistics import Paired
from harness.report.tables import Cell, Row, Section, borrows_stage_one, method_label
from harness.report.verdict import Standing, digits_of


def number(value: float | None, digits: int = 1) -> str:
    """1234.5 -> "1,234.5"; "-" where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """+1.2, with a true minus sign for the negative."""
    if value is None:
        return "-"
    rounded = round(value, digits) + 0.0  # no minus before a zero
    return f"{rounded:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def share(value: float | None) -> str:
    """0.034 -> "3.4 %"."""
    return "-" if value is None else f"{value:.1%}".replace("%", " %")


def spread(mean: float | None, std: float | None, n: int) -> str:
    """Mean, sample standard deviation where there is one, and n."""
    if mean is None:
        return "-"
    return f"{number(mean)} (n={n})" if std is None else f"{number(mean)} ± {number(std)} (n={n})"


def seconds(value: float | None) -> str:
    """62 -> "62 s", 754 -> "12.6 min", 9000 -> "2.5 h"."""
    if value is None:
        return "-"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def cell_text(cell: Cell) -> str:
    """A cell of the main table on one line."""
    text = score(cell)
    return text if cell.gain is None else f"{text} [{gain(cell)}]"


def metric(key: str) -> str:
    """ap_s -> "APs", voc07_ap50 -> "VOC07 AP50"."""
    words = {"voc07_ap50": "VOC07 AP50", "voc_ap50": "VOC AP50"}
    return words.get(key, key.replace("ap", "AP").replace("ar", "AR").replace("_", ""))


def score(cell: Cell) -> str:
    """Mean, spread and n of a cell."""
    return spread(cell.mean("ap"), cell.std("ap"), cell.n)


def gain(cell: Cell) -> str:
    """Difference to the baseline, its spread, and n where it is not the cell's."""
    text = signed(cell.gain) + (f" ± {number(cell.gain_std)}" if cell.gain_std is not None else "")
    return text if len(cell.gains) == cell.n else f"{text} (n={len(cell.gains)})"


def is_best(cell: Cell, section: Section) -> bool:
    """Whether no other cell of its column has a higher mean, and there are others; says nothing about chance."""
    means = [row.cells[cell.percent].mean("ap") for row in section.rows if cell.percent in row.cells]
    known = [mean for mean in means if mean is not None]
    return len(known) > 1 and cell.mean("ap") == max(known)


def interval(one: Paired | ImageInterval | None) -> str:
    """ "+1.1 to +5.3", or why there is none."""
    if one is None:
        return "-"
    if one.low is None or one.high is None:
        return one.note if isinstance(one, Paired) else "-"
    digits = digits_of(one.low, one.high)
    return f"{signed(one.low, digits)} to {signed(one.high, digits)}"


def p_value(p: float | None) -> str:
    """0.0234 -> "0.023"; "< 0.001" below that."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def mean_difference(one: Paired | None) -> str:
    """Mean difference ± its spread (n)."""
    if one is None or one.mean is None:
        return "-"
    return signed(one.mean) + (f" ± {number(one.sd)}" if one.sd is not None else "") + f" (n={one.n})"


def says(one: Compared) -> str:
    """What the runs allow to say about a comparison, in words."""
    words = {
        Standing.BETTER: "better",
        Standing.WORSE: "worse",
        Standing.OPEN: "open",
        Standing.UNKNOWN: "no statement",
    }
    return words[one.standing] + (", may come from compute alone" if one.by_compute_alone else "")


def labels_text(one: Compared | None) -> str:
    """ "= supervised with 46 (44 to 49)": how many labels the baseline needs; empty where that is unknown."""
    needed = shown_labels(one) if one is not None else None
    if one is None or needed is None:
        return ""
    text = f"= {one.found.baseline.lower()} with {needed.statement}"
    over_runs = one.found.labels_needed
    by_images = over_runs is not None and over_runs.low is None and needed.low is not None
    measured = needed.labels != 0 and math.isfinite(needed.labels)
    return text.removesuffix(")") + ", by images)" if by_images and measured else text


def labelled(section: Section, at: float) -> str:
    """How many images are labelled at a ratio: "8 images", or a range where folds differ."""
    counts = [run.record.labeled_images for row in section.rows for run in row.cells[at].runs]
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    unit = "image" if high == 1 else "images"
    return f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}"


def pseudo_cells(section: Section) -> list[tuple[Row, Cell]]:
    """The cells of methods that learn from pseudo labels."""
    return [(row, cell) for row, cell in filled(section) if any(_uses_pseudo_labels(run.record) for run in cell.runs)]


def _uses_pseudo_labels(record: RunRecord) -> bool:
    return record.pseudo_precision is not None or record.batch_unlabeled > 0


def known(value: float | None) -> str:
    """A share of pseudo labels; "unknown" where the truth is."""
    return "unknown" if value is None else number(value, 2)


def filled(section: Section) -> list[tuple[Row, Cell]]:
    """The cells that have runs, row by row, the reference last."""
    rows = [*section.rows, *section.reference]
    return [(row, cell) for row in rows for cell in row.cells.values() if cell.runs]


_EVALUATED_ON = {
    "holdout": ", taken from the labelled ones by split.holdout",
    "tune": " of split.tune, which settings are chosen on",
}


def facts(section: Section) -> list[tuple[str, str]]:
    """What a reader must know to compare this table with another."""
    if not section.runs:
        return []
    one = section.runs[0].record
    found = [
        ("dataset", f"{one.dataset}, sha256 {hash_of(one.dataset_sha256)}"),
        ("split protocol", f"{one.protocol}; images without boxes: {one.empty_images}, crowd boxes: {one.crowd_boxes}"),
        *([("labels", _shots(section))] if section.by_shots else []),
        ("folds and seeds", f"folds {_listed(section.distinct('fold'))}, seeds {_listed(section.distinct('seed'))}"),
        (
            "evaluation",
            f"{one.eval_images:,} images{_EVALUATED_ON.get(one.evaluated_on, '')}, sha256 {hash_of(one.val_sha256)}; "
            f"scores above {one.score_threshold:g} count",
        ),
        (
            "detector",
            f"{one.detector}, {one.trainable_parameters / 1e6:.2f} M trained parameters, preset {one.preset or '-'}",
        ),
        ("first weights", one.pretraining or "not recorded"),
        ("data pipeline", _listed(section.distinct("pipeline"))),
    ]
    tune = {(run.record.tune_images, run.record.tune_boxes) for run in section.runs if run.record.tune_images}
    if tune:
        listed = " or ".join(f"{images:,} images with {boxes:,} boxes" for images, boxes in sorted(tune))
        found.append(("set for choosing settings", f"{listed}, labels beside those of the training"))
    deviations = sorted({line for run in section.runs for line in run.record.augment_deviations})
    found += [("augmentation differs from the paper", "; ".join(deviations))] if deviations else []
    on_cpu = [run.record.environment for run in section.runs if not run.record.environment.get("gpus")]
    counts = {json.dumps(environment.get("threads")) for environment in on_cpu}
    if len(counts) > 1 or any(text.startswith("[") for text in counts):
        found.append(("not of equal rounding", "runs differ in CPU threads, which change the order of sums"))
    lenders = sorted({method_label(run.record.method) for run in section.runs if borrows_stage_one(run.record)})
    if lenders:
        found.append((f"stage 1 of {', '.join(lenders)}", "the supervised baseline of this suite, not the paper's own"))
    machines = sorted({machine(run.record.environment) for run in section.runs})
    found += [
        ("machine", "; ".join(machines)),
        ("code", _listed([hash_of(c or "-") for c in section.distinct("commit")])),
    ]
    return found


def _shots(section: Section) -> str:
    """What is labelled besides the images that a class was to have."""
    each = []
    for shots in section.percents:
        records = [run.record for row in section.rows for run in row.cells[shots].runs]
        images = [count for record in records for count in record.labeled_by_class.values()]
        if images:
            boxes = sorted({record.labeled_boxes for record in records})
            each.append(
                f"{section.column(shots)}: each class on {_range(min(images), max(images))} labelled images, with "
                f"{_range(boxes[0], boxes[-1])} boxes on all of them"
            )
    rule = "shots count images: each class is on at least so many, and every box on a labelled image is labelled"
    return "; ".join([rule, *each])


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def machine(environment: dict[str, Any]) -> str:
    """GPUs or processor, and the versions that move numbers."""
    gpus = environment.get("gpus") or []
    what = (
        f"{len(gpus)} x {gpus[0]}" if gpus else f"{environment.get('cpu', '-')}, {environment.get('cores', '-')} cores"
    )
    packages = environment.get("packages", {})
    versions = [f"{name} {packages[name]}" for name in ("torch", "torchvision") if name in packages]
    threads = environment.get("threads", "-")
    changed = isinstance(threads, list)
    text = (
        f"{' then '.join(map(str, threads))} threads" if changed else f"{threads} thread{'' if threads == 1 else 's'}"
    )
    return ", ".join([what, f"{text} per process", *versions])


def cost_statement(section: Section) -> str:
    """Whether the comparison is one at equal cost, in student steps."""
    steps = {row.label: cell.mean("steps") or 0.0 for row, cell in filled(section)}
    extra = {row.label: cell.mean("extra_steps") or 0.0 for row, cell in filled(section)}
    by_count: dict[float, list[str]] = {}
    for label, count in steps.items():
        by_count.setdefault(count, []).append(label)
    if len(by_count) == 1:
        text = f"Every run took the same number of student steps ({next(iter(by_count)):,.0f})."
    else:
        text = "Student steps differ: " + "; ".join(f"{n:,.0f} {', '.join(own)}" for n, own in by_count.items()) + "."
    also = [f"{name} needs a finished run of {count:,.0f} further steps" for name, count in extra.items() if count]
    return text + (f" Beyond that, {' and '.join(also)} for its pseudo labels." if also else "")


def memory(cell: Cell) -> str:
    """Peak memory of the process, and of the GPU where one was used."""
    host, gpu = cell.mean("peak_memory_mb"), cell.mean("peak_gpu_memory_mb")
    text = "-" if host is None else f"{host / 1024:.1f} GB"
    return text if gpu is None else f"{text} + {gpu / 1024:.1f} GB GPU"


def images_seen(cost: Cost | None) -> str:
    """Labelled plus unlabelled images that the student saw, those of a first stage included."""
    return number(cost.images if cost is not None else None, 0)


def device_time(cost: Cost | None) -> str:
    """Device hours, shown as a time; "unknown" where a first stage's are."""
    return "unknown" if cost is None or cost.device_hours is None else seconds(3600 * cost.device_hours)


def front(cost: Cost | None) -> str:
    """On which Pareto fronts a cell is."""
    if cost is None:
        return "-"
    on = [name for name, there in (("images", cost.front_by_images), ("hours", cost.front_by_hours)) if there]
    return ", ".join(on) or "-"


def hash_of(text: str) -> str:
    """The beginning of a sha256 or commit, "-dirty" kept."""
    return text[:10] + ("-dirty" if text.endswith("-dirty") else "")


def _listed(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values)


def published_value(line: dict[str, str] | None) -> str:
    """A published number with its spread, each marked unless it was read at the source."""
    if line is None:
        return "-"
    marks = {"read": "", "recalled": "†", "third_party": "‡"}
    text = line["ap"] + marks[line["ap_status"]]
    return text + (f" ± {line['ap_std']}{marks[line['std_status']]}" if line["ap_std"] else "")


def published_percent(text: str) -> str:
    """ "10" -> "10 %", "full" as it is."""
    return text if text == "full" else f"{text} %"


def distinct_values(row: dict[str, Any], key: str) -> str:
    """The values of a column over a source's numbers, the full setting named where it differs."""
    values = {name: line[key] for name, line in row["values"].items()}
    partial = list(dict.fromkeys(value for name, value in values.items() if name != "full" and value))
    full = values.get("full")
    if full and full not in partial:
        return "; ".join([*partial, f"full: {full}" if partial else full])
    return "; ".join(partial)


def heat(value: float) -> str:
    """0..100 as a share for a colour."""
    return f"{value / 100:.2f}"


def data_uri(svg: str) -> str:
    """An image that lies within the page, so that one file is the whole report."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
