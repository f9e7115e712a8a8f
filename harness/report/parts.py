"""A section of the report: a table, what its numbers say together, and the words for what is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.core.record import BASELINE
from harness.engine.accumulate import METRICS
from harness.engine.errors import KINDS
from harness.report import plots
from harness.report.chance import ImageChance
from harness.report.comparison import Analysis, Compared, analyse
from harness.report.fairness import Conditions, Footnote, conditions, equal_compute_command, footnotes, marks
from harness.report.gallery import Gallery, show
from harness.report.tables import Row, Section, method_label

MORE_SCORES = (*(key for key in METRICS if key.startswith("ar")), "voc07_ap50", "voc_ap50")


CLASS_METRICS = {
    "ap": "AP",
    "ar": "AR",
    "pseudo_precision": "precision of the pseudo labels",
    "pseudo_recall": "recall of the pseudo labels",
}.items()


@dataclass
class Part:
    """What the templates show of one section."""

    number: int
    section: Section
    analysis: Analysis
    conditions: list[Conditions]
    footnotes: list[Footnote]
    no_images: str  # why there is no interval over evaluation images
    compute: str  # what may be said about compute
    commands: list[str] = field(default_factory=list)  # that train the baseline on as many images
    more_scores: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    class_percents: list[float] = field(default_factory=list)
    kinds: tuple[str, ...] = ()  # of errors, empty where no record has them
    pictures: Gallery | None = None
    no_pictures: str = ""

    @property
    def voc(self) -> bool:
        """Whether AP is shown in VOC's ways too."""
        return "voc_ap50" in self.more_scores

    @property
    def no_verdict(self) -> str:
        """Why nothing is said."""
        base = method_label(BASELINE).lower()
        return f"No verdict: no method here has a run of {base} of the same split, seed and number of steps beside it."

    def marks(self, row: Row) -> list[str]:
        """Of the footnotes that a row has."""
        return marks(self.footnotes, row)

    def class_rows(self, percent: float) -> list[Row]:
        """The rows with scores by class at a ratio."""
        rows = [row for row in self.section.rows if percent in row.cells]
        return [row for row in rows if any(run.record.per_class for run in row.cells[percent].runs)]

    def class_columns(self, percent: float) -> list[tuple[Row, str, str]]:
        """Columns of the table of classes at a ratio: row, metric, heading. Those without any value are left out."""
        columns = [(row, key, said) for key, said in CLASS_METRICS for row in self.class_rows(percent)]
        return [
            (row, key, said)
            for row, key, said in columns
            if any(row.cells[percent].of_class(name, key) is not None for name in self.classes)
        ]


def part_of(
    number: int,
    section: Section,
    resamples: int,
    gallery: int,
    problems: list[str],
    *,
    draw: bool = True,
    cache_dir: Path | None = None,
) -> Part:
    """Works out a section.

    Args:
        number: of the section, from 1.
        section: one table.
        resamples: of the evaluation images; 0: none.
        gallery: images to show; 0: none.
        problems: gets sentences about what could not be used.
        draw: whether to make figures.
        cache_dir: root of the cache; None: nothing is kept.
    """
    if draw:
        section.plots = plots.draw(section, problems)
    chance = ImageChance(section, resamples, problems, cache_dir)
    analysis = analyse(section, chance, resamples)
    if draw and (svg := plots.ap_by_compute(section, analysis.costs)) is not None:
        section.plots["ap_by_compute"] = svg
    no_images = (
        "report.resamples=0" if not resamples else "no run has the matches.npz of its evaluation beside its record"
    )
    compute, commands = _compute(section, analysis)
    part = Part(number, section, analysis, conditions(section), footnotes(section), no_images, compute, commands)
    part.more_scores = _more_scores(section)
    part.classes = list(dict.fromkeys(name for run in section.runs for name in run.record.per_class))
    part.class_percents = [percent for percent in section.percents if part.class_rows(percent)]
    part.kinds = KINDS if any(run.record.errors for run in section.runs) else ()
    if gallery:
        part.pictures, part.no_pictures = show(section, gallery)
    return part


def _more_scores(section: Section) -> list[str]:
    found = {key for run in section.runs for key in run.record.scores.get(run.record.reported_network, {})}
    return [key for key in MORE_SCORES if key in found]


def _compute(section: Section, analysis: Analysis) -> tuple[str, list[str]]:
    """Sentences about equal compute: who wins on compute alone, and how to find out where that is unknown."""
    base = method_label(BASELINE).lower()
    sentences = []
    if alone := [one for one in analysis.compared if one.by_compute_alone]:
        named = ", ".join(_with_shares(section, analysis.compared, alone))
        sentences.append(
            f"Better than {base} of as many steps, but not shown to be better than {base} with as many images seen, so "
            f"that the gain may come from compute alone: {named}."
        )
    lacking = [one for one in analysis.compared if one.equal_row is None]
    if not lacking:
        return " ".join(sentences), []
    named = ", ".join(_with_shares(section, analysis.compared, lacking))
    sentences.append(
        f"No run of {base} saw as many images (within 5 %) as {named}: what they gain may come from compute alone."
    )
    images = {analysis.costs[one.row.label, one.cell.percent].images for one in lacking}
    commands = [equal_compute_command(section, count) for count in sorted(count for count in images if count)]
    known = [command for command in dict.fromkeys(commands) if command is not None]
    if known:
        sentences.append("With the suite's other settings, such runs are trained by")
    return " ".join(sentences), known[:5]


def _with_shares(section: Section, compared: list[Compared], some: list[Compared]) -> Iterator[str]:
    """Labels of rows; with the shares of labels where `some` has not all that were compared."""
    for label in dict.fromkeys(one.row.label for one in some):
        shares = [one.cell.percent for one in some if one.row.label == label]
        whole = len(shares) == sum(one.row.label == label for one in compared)
        yield label if whole else f"{label} ({', '.join(section.column(share) for share in shares)})"
