"""Names of any characters in each form that they are written in, read back by somebody else's parser of that form."""

from __future__ import annotations

import csv
import html.parser
import io
import re
import xml.etree.ElementTree as ElementTree

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from harness.core import escape
from harness.report import report

_SPECIAL = [
    *"|`*_~<>&[](){}\\$#%^-+=@!\"':;,/.1a \t\r\n\v\x00\x1b\x85\u2028\u202e\ud800\ufffe\U0001f600±\u2212",
    *("[/x]", "[bold]", "$x_{y$", "<script>", "&amp;", "\\|", "](u)", "1. ", "- ", "--- ", "[x] ", "http://a.b"),
]
NAMES = st.lists(st.sampled_from(_SPECIAL) | st.characters(exclude_categories=()), max_size=12).map("".join)


class Reader(html.parser.HTMLParser):
    """Text of each element, and of each title."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.titles: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.texts.append("")
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


def parsed(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


@given(NAMES)
def test_plain_is_one_line_that_can_be_encoded(name: str) -> None:
    shown = escape.plain(name)
    assert len(shown.splitlines()) <= 1
    assert shown.encode().decode() == shown
    assert "\x1b" not in shown
    assert escape.plain(shown) == shown


@pytest.mark.parametrize(
    "name", ["Soft Teacher (schedule.steps=5)", "é ü 猫 🐈 👩‍👩‍👧", "a_b", "28.0 ± 2.6 (n=3) [+6.0]"]
)
def test_what_is_harmless_stays(name: str) -> None:
    assert escape.plain(name) == name
    assert escape.markdown(name) == name
    assert escape.csv_cell(name) == name


@given(NAMES, NAMES)
def test_markdown_table_keeps_its_columns_and_its_text(first: str, second: str) -> None:
    table = f"| a | b |\n|---|---|\n| {escape.markdown(first)} | {escape.markdown(second)} |\n"
    page = parsed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(table))
    assert [tag for tag in page.tags if tag != "td"] == ["table", "thead", "tr", "th", "th", "tbody", "tr"]
    texts = [text.strip() for tag, text in zip(page.tags, page.texts, strict=True) if tag == "td"]
    assert texts == [escape.plain(name).strip() for name in (first, second)]


@given(NAMES)
def test_markdown_list_item_is_text_alone(name: str) -> None:
    page = parsed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"- {escape.markdown(name)}: x\n"))
    assert page.tags == ["ul", "li"]
    assert page.texts[-1].strip() == f"{escape.plain(name).strip()}: x".strip()


@given(NAMES)
def test_html_gives_the_same_text(name: str) -> None:
    template = report._templates()["report.html"].from_string('<p title="{{ name }}">{{ name }}</p>')
    page = parsed(template.render(name=name))
    assert (page.tags, page.texts, page.titles) == (["p"], [escape.plain(name)], [escape.plain(name)])


_LATEX_BACK = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"\textasciigrave{}": "`",
    r"$\pm$": "±",
    "$-$": "\N{MINUS SIGN}",
    r"\dag{}": "†",
    r"\ddag{}": "‡",
    "{[}": "[",
    "{*}": "*",
}


@given(NAMES)
def test_latex_has_balanced_braces_and_no_bare_special(name: str) -> None:
    written = escape.latex(name)
    words = "|".join(map(re.escape, _LATEX_BACK))
    bare = re.sub(rf"{words}|\\[&%$#_{{}}]", "", written)
    assert not re.search(r"[\\&%$#_{}~^\n]", bare)
    assert not written.startswith(("[", "*"))  # an option of the \\ before it
    grouped = re.sub(r"\\[{}]", "", written)
    assert grouped.count("{") == grouped.count("}")
    back = re.sub(rf"({words})|\\([&%$#_{{}}])", lambda m: _LATEX_BACK.get(m[0]) or m[2], written)
    assert back == escape.plain(name).strip()


@given(NAMES, st.floats(-9, 9))
def test_csv_gives_the_text_and_no_formula(name: str, number: float) -> None:
    written = report._csv(pd.DataFrame({"name": [name], "number": [number]})).decode()
    _, (text, value) = csv.reader(io.StringIO(written, newline=""))
    guard = "'" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else ""
    assert text == guard + name.encode("utf-8", "backslashreplace").decode()
    assert float(value) == number  # a negative number stays one


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_formulas_are_guarded(name: str) -> None:
    assert escape.csv_cell(name) == f"'{name}"


@given(NAMES)
def test_rich_prints_the_name_itself(name: str) -> None:
    console = Console(file=io.StringIO(), width=500, force_terminal=False)
    console.print(escape.literal(name), soft_wrap=True)
    assert console.file.getvalue() == escape.plain(name) + "\n"  # type: ignore[attr-defined]


@given(NAMES)
def test_ascii_terminal_never_refuses(name: str) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    escape.never_refuse(stream)
    console = Console(file=stream, width=200)
    table = Table("±")
    table.add_row(escape.literal(f"{name} ±", console.encoding))
    console.print(table)
    print(name, file=stream)
    stream.flush()
    assert "+/-" in written.getvalue().decode("ascii")


@settings(max_examples=25, deadline=None)
@given(NAMES)
def test_matplotlib_draws_the_name(name: str) -> None:
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.plot([1, 2], label=f"a {escape.figure_label(name)}")
    axes.set_title(escape.figure_label(name, longest=1000))
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    ElementTree.fromstring(buffer.getvalue())
    assert axes.title._preprocess_math(axes.title.get_text()) == (escape.plain(name), False)  # type: ignore[attr-defined]


@given(NAMES | NAMES.map(lambda name: name * 50))
def test_file_name_is_one_part_of_a_path(name: str) -> None:
    found = escape.file_name(name)
    assert re.fullmatch(r"[A-Za-z0-9_.-]{0,200}", found)
    assert escape.file_name(found) == found


def test_long_file_names_stay_apart() -> None:
    assert escape.file_name("a" * 300 + "b") != escape.file_name("a" * 300 + "c")
    assert escape.file_name("coco_stac_stac-10pct-fold1_seed1") == "coco_stac_stac-10pct-fold1_seed1"
