"""What the documentation refers to is there: links, anchors, pages, keys of a record, pictures."""

from __future__ import annotations

import ast
import csv
import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
import yaml

from harness.core.types import RunRecord
from harness.report.tables import method_label
from pipelines import policy

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/reference/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def links(page: Path) -> Iterator[str]:
    """Targets of a page's links and pictures, those to other sites left out."""
    text = re.sub(r"`[^`\n]*`", "`code`", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text):
        found = target[0] or target[1]
        if not re.match(r"[a-z]+:", found):
            yield found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_links_are_found() -> None:
    """The test above looks at what there is."""
    assert sum(len(list(links(page))) for page in PAGES) > 40
    assert "architecture" in anchors(ROOT / "README.md")


def listed(nav: object) -> Iterator[str]:
    """Pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from listed(part)


def test_every_page_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(listed(nav)) == sorted(pages)


def test_every_key_of_a_record_is_explained_once() -> None:
    rows = re.findall(r"^\| (`.+?) \| .+ \|$", prose(ROOT / "docs/reference/record.md"), re.MULTILINE)
    explained = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    kept = [field.name for field in dataclasses.fields(RunRecord)]
    assert Counter(explained) == Counter(kept)


def test_every_public_name_of_the_python_api_is_explained() -> None:
    module = ast.parse((ROOT / "harness/api.py").read_text(encoding="utf-8"))
    public = set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            public.add(node.name)
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(part, ast.FunctionDef):
                public.add(part.name)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                public.add(part.target.id)
    text = prose(ROOT / "docs/reference/api.md")
    explained = set(re.findall(r"`(\w+)(?:\([^`]*\))?`|^## (\w+)$", text, re.MULTILINE))
    missing = {name for name in public if not name.startswith("_")} - {a or b for a, b in explained}
    assert not missing


def test_the_table_of_the_readme_is_the_measured_one() -> None:
    """Its cells, rounded, are those of the report of shapes; times are over those of supervised runs."""
    measured, hours = {}, defaultdict(list)
    with (ROOT / "results/reference/shapes-2cores/report.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["detector"], method_label(row["method"])
            measured[*key, f"{float(row['percent']):g} %"] = f"{float(row['ap']):.1f} ± {float(row['ap_std']):.1f}"
            hours[key].append(float(row["device_hours"]))
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| detector | method ")[1].split("\n\n")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    detectors = {
        "Faster R-CNN": "small",
        "FCOS": "small_fcos_iou",
        "Consistent-Teacher's RetinaNet": "small_consistent_retina",
    }
    assert len(rows) == len(hours)
    for name, method, *cells, time in rows:
        detector = detectors[name]
        assert cells == [measured[detector, method, share] for share in head[:-1]]
        ratio = mean(hours[detector, method]) / mean(hours[detector, "Supervised"])
        assert time == f"{ratio:.1f}"


def test_the_table_of_photographs_in_the_readme_is_the_measured_one() -> None:
    rows = {}
    for data in ("raccoon", "bccd"):
        with (ROOT / f"results/reference/{data}-2cores/report.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows[method_label(row["method"]), f"{data}, {float(row['percent']):g} %"] = row["ap"]
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| one fold ")[1].split("\n\n")[0]
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    shown = {(method, share): ap for method, *cells in lines for share, ap in zip(head, cells, strict=True)}
    assert shown == {key: f"{float(ap):.1f}" for key, ap in rows.items()}


def test_the_figure_of_the_site_is_the_measured_one() -> None:
    """A page of the site shows pictures below docs/ alone: copy the figure there when it is made again."""
    measured = ROOT / "results/reference/shapes-2cores/detectors_1.svg"
    assert (ROOT / "docs/tutorial/ap_by_ratio.svg").read_bytes() == measured.read_bytes()


def test_every_key_and_operation_of_a_policy_is_described() -> None:
    text = (ROOT / "docs" / "pipelines.md").read_text()
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    kinds = (policy.RangeKeys, policy.ResizeKeys, policy.ColorKeys, policy.AffineKeys, policy.EraseKeys)
    keys = {field.name for kind in (*kinds, policy.ViewKeys, policy.PolicyKeys) for field in dataclasses.fields(kind)}
    assert sorted(keys - words) == []
    assert sorted({*policy.COLOR_OPS, *policy.AFFINE_OPS} - words) == []
