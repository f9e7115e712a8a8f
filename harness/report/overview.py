"""The tables of one suite that differ in their detector alone, beside each other; nothing is averaged over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.report import plots
from harness.report.tables import Row, Section


@dataclass
class Overview:
    """Tables that share everything but the detector.

    Args:
        number: of the overview, from 1.
        sections: two or more.
        plot: their figure as SVG, a panel each; None where there is nothing to draw.
    """

    number: int
    sections: list[Section]
    plot: str | None = None

    @property
    def title(self) -> str:
        """What they share."""
        return f"{self.sections[0].place}: {len(self.sections)} detectors"

    @property
    def percents(self) -> list[float]:
        """The columns of all of them."""
        return sorted({percent for section in self.sections for percent in section.percents})

    @property
    def rows(self) -> list[tuple[Section, Row]]:
        """The rows of all tables, with their table."""
        return [(section, row) for section in self.sections for row in section.rows]


def overviews(sections: Sequence[Section], *, draw: bool = True) -> list[Overview]:
    """Tables of different detectors that may stand beside each other.

    Args:
        sections: all tables of a report.
        draw: whether to make figures.
    """
    groups: dict[str, list[Section]] = {}
    for section in sections:
        shared = {key: value for key, value in section.keys.items() if key != "detector"}
        groups.setdefault(repr(shared), []).append(section)
    several = [group for group in groups.values() if len(group) > 1]
    return [
        Overview(number, group, plots.ap_by_ratio(group) if draw else None) for number, group in enumerate(several, 1)
    ]
