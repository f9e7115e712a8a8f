"""What earlier commands wrote, read back: real files pass, damaged ones are named, and no damage stops a report."""

from __future__ import annotations

import contextlib
import csv
import html.parser
import io
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from harness.cli import main
from harness.config import compose, saved
from harness.config.identity import identity
from harness.core import readback
from harness.core.escape import never_refuse
from harness.core.record import write_record
from harness.core.types import RunRecord, UserError
from harness.engine.log import RunLog, cut_lines
from harness.report import curves, plots, report, tables
from harness.suite import plan

FILES = ("runs/quick/a/record.json", "runs/quick/b/record.json", "runs/quick/b/metrics.jsonl", "runs/quick/suite.json")


def _record(cell: str, method: str, **changes: Any) -> RunRecord:
    values: dict[str, Any] = {"status": "ok", "cell": cell, "suite": "quick", "method": method, "percent": 10.0}
    values |= {"fold": 1, "seed": 1, "ap": 50.0, "dataset": "shapes", "protocol": "soft_teacher", "steps": 9}
    values |= {"labeled_images": 8, "unlabeled_images": 72, "batch_unlabeled": 2, "reported_network": "teacher"}
    values |= {"environment": {"gpus": [], "cpu": "x", "cores": 2, "threads": 1, "packages": {"torch": "2"}}}
    values |= {"config": {"split": {"percent": 10, "fold": 1}, "schedule": {"steps": 9}}, "resumed_from": [3]}
    return RunRecord(**(values | changes))


def make(folder: Path) -> None:
    """A suite of two runs and a third that left no record, in real files."""
    suite = folder / "runs/quick"
    scored: dict[str, Any] = {"scores": {"teacher": {"ap": 60.0, "ar": 70.0}}, "per_class": {"cat": {"ap": 60.0}}}
    scored |= {"errors": {"class": {"count": 3.0, "lost_ap50": 1.0}}, "train_seconds": 9.0, "batch_labeled": 2}
    write_record(suite / "a/record.json", _record("a", "supervised", **scored))
    write_record(suite / "b/record.json", _record("b", "stac", ap=60.0, pseudo_precision=0.5, extra_steps=9, **scored))
    log = RunLog(suite / "b", steps=6, title="b", every=1, loggers=[])
    for step in range(6):
        log.step(step, {"loss": 1.0 / (step + 1)}, {}, 0.1, 2, 0.1, 0.2)
        log.pseudo(step, {"box": {"precision": 0.5, "recall": 0.25, "iou": 0.75}})
        log.evaluation(step, "teacher", {"ap": 10.0 * step, "ap_s": None})
    log.close()
    cell = {"method": "stac", "percent": 10.0, "fold": 2, "seed": 2, "dataset": "shapes", "protocol": "soft_teacher"}
    cells = [cell | {"name": name, "state": "failed", "reason": "the disk was full"} for name in ("b", "c")]
    (suite / "suite.json").write_text(json.dumps({"suite": "quick", "cells": cells}))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    make(folder)
    return folder


def test_healthy_files_have_no_problem(healthy: Path, tmp_path: Path) -> None:
    text = report.run(healthy / "runs", tmp_path).with_suffix(".md").read_text()
    assert "damaged" not in text
    assert "c: failed: the disk was full" in text
    assert len(readback.read_metrics(healthy / "runs/quick/b").lines) == 18
    progress = readback.read_progress(healthy / "runs/quick/b")
    assert progress is not None
    assert (progress.step, progress.steps) == (6, 6)


_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**400), 2**63, 2**64, 1e308, -1e308, 1e-320, 0, -1, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "[/x]", "$x_{y$", "a|b", "<b>", "\x00", "\x1b[31m", "\ud800", "../..", "=1+1", "\\", "{}%"]),
    st.sampled_from([[], {}, [[]], {"a": {"b": [1, None]}}, [1, "a"], json.loads("[" * 40 + "]" * 40)]),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The address of every value within plain data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in _places(child, (*path, key)))]


@st.composite
def corrupted(draw: st.DrawFn, content: bytes) -> bytes:
    """The content cut, with bytes flipped, or with a value of another type, a key less or nested junk somewhere."""
    kind = draw(st.sampled_from(["cut", "flip", "value", "remove", "rename"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "flip":
        position, byte = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 255))
        return content[:position] + bytes([byte]) + content[position + 1 :]
    lines = content.splitlines() if b'"kind"' in content else [content]
    number = draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[number])
    place = draw(st.sampled_from(_places(value)))
    if not place:
        value = draw(_JUNK)
    else:
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        if kind == "value":
            parent[place[-1]] = draw(_JUNK)
        else:
            removed = parent.pop(place[-1])
            if kind == "rename" and isinstance(parent, dict):
                parent[draw(st.text(max_size=5))] = removed
    lines[number] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FILES))
def test_no_damage_stops_a_report(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, name: str
) -> None:
    """Figures are made, but not rendered, which takes most of the time; see the next test."""
    for module in (curves, plots):
        monkeypatch.setattr(module, "as_svg", lambda _: "<svg/>")
    content = (healthy / name).read_bytes()
    folder = tmp_path / "work"
    if not folder.exists():
        make(folder)
    (folder / name).write_bytes(data.draw(corrupted(content)))
    try:
        text = report.run(folder / "runs", tmp_path / "out").with_suffix(".md").read_text()
        assert "50.0 (n=1)" in text or "60.0 (n=1)" in text  # the other run is in the table
    finally:
        (folder / name).write_bytes(content)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FILES))
def test_no_damage_stops_the_command(
    healthy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], data: st.DataObject, name: str
) -> None:
    content = (healthy / name).read_bytes()
    folder = tmp_path / "work"
    if not folder.exists():
        make(folder)
    (folder / name).write_bytes(data.draw(corrupted(content)))
    try:
        assert main(["report", f"runs_dir={folder / 'runs'}", f"out={tmp_path / 'out'}"]) == 0
        assert "Traceback" not in capfd.readouterr().err
    finally:
        (folder / name).write_bytes(content)


def _report(folder: Path) -> str:
    return report.run(folder / "runs", folder / "out").with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (FILES[1], b"{", "is not valid JSON"),
        (FILES[1], b'{"schema_version": 7}', "is too new (schema 7"),
        (FILES[2], b'{"kind": "train", "step": "1", "loss": 1}\n', "line 1: step: Expected"),
        (FILES[2], b'{"kind": "eval", "step": 1, "network": "teacher"}\n', "1 of 1 lines do not fit"),
        (FILES[2], b"[1]\nnot JSON\n", "2 of 2 lines do not fit, first line 1"),
        (FILES[3], b'{"suite": "quick", "cells": [{}]}', "cells\\[0]: Object missing"),
        (FILES[3], b'{"suite": "quick"}', "missing required field"),
        (FILES[3], b"\xff", "is not valid JSON"),
    ],
)
def test_report_names_what_is_damaged_and_goes_on(tmp_path: Path, name: str, damage: bytes, words: str) -> None:
    make(tmp_path)
    (tmp_path / name).write_bytes(damage)
    text = _report(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("> "))
    assert Path(name).name in line
    assert words.replace("\\[", "[").split(":")[0] in line.replace("\\", "")
    assert "50.0 (n=1)" in text


def test_report_passes_over_a_fifo_and_a_folder(tmp_path: Path) -> None:
    make(tmp_path)
    for name in FILES[1:]:
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / FILES[1])
    os.mkfifo(tmp_path / FILES[3])
    (tmp_path / FILES[2]).mkdir()
    text = _report(tmp_path)
    assert text.count("Not a regular file") == 2
    assert "50.0 (n=1)" in text


def test_report_without_published_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    whole = report.PUBLISHED.read_text()
    monkeypatch.setattr(report, "PUBLISHED", tmp_path / "published.csv")
    for damage in ("", whole[:200], whole.replace("recalled", "dreamt"), whole.replace("9.05", "x"), "\x00", '"'):
        (tmp_path / "published.csv").write_text(damage)
        problems: list[str] = []
        assert report.published(problems) == []
        assert "published.csv is damaged" in problems[0]
    (tmp_path / "published.csv").unlink()
    assert "published" not in _report(tmp_path)  # of other data than COCO there is nothing to show them beside
    write_record(tmp_path / FILES[0], _record("a", "supervised", dataset="coco"))
    assert "published.csv cannot be read" in _report(tmp_path)


def test_cut_lines_drops_what_is_damaged(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / FILES[2]
    good = path.read_bytes()
    path.write_bytes(b'{"kind": "eval", "step": "0"}\n' + good + b'{"step": 1}\n[]\n{"kind": "ev')
    assert cut_lines(path, 6) == {(step, "teacher") for step in range(6)}
    assert path.read_bytes() == good
    cut_lines(path, 3)
    assert len(path.read_bytes().splitlines()) == 9


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"step": 3}', '{"step": 3, "steps": 0}', '{"step": "3", "steps": 9}']
)
def test_progress_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "progress.json").write_text(content)
    assert readback.read_progress(tmp_path) is None


def test_config_of_a_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    cfg = compose.load(["data=shapes", "device=cpu", "seed=3"])
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    assert identity(saved.read_config(tmp_path)) == identity(cfg)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_config_is_told_or_read(tmp_path: Path, data: st.DataObject) -> None:
    text = OmegaConf.to_yaml(compose.load(["data=shapes"]), resolve=True) if not CONFIG else CONFIG[0]
    CONFIG[:] = [text]
    position = data.draw(st.integers(0, len(text) - 1))
    junk = data.draw(st.text(max_size=3) | st.sampled_from(["\t", "[", "{", ": ", "!!", "&", "*", "${", "\x00", "- "]))
    (tmp_path / "config.yaml").write_bytes((text[:position] + junk + text[position + 1 :]).encode())
    with contextlib.suppress(UserError):  # and nothing else
        assert saved.read_config(tmp_path).data.name


CONFIG: list[str] = []


def test_ids_stand_under_the_share_that_they_are(tmp_path: Path) -> None:
    """20 of 128 images are 15.6 %, whatever split.percent says; a method may leave unlabelled images out."""
    ids = {"labeled_images": 20, "split_sha256": "s"}
    for percent, protocol in ((10.0, "ids"), (None, "ids"), (15.625, "ids"), (15.625, "annotated")):
        ids |= {"protocol": protocol}
        record = _record("a", "supervised", unlabeled_images=108, percent=percent, **ids)
        write_record(tmp_path / "runs/quick/a/record.json", record)
        write_record(
            tmp_path / "runs/quick/b/record.json", _record("b", "stac", unlabeled_images=50, percent=percent, **ids)
        )
        text = _report(tmp_path)
        assert f"| method | 15.6 % ({protocol}) (20 images) |" in text
        assert len(tables.load(tmp_path / "runs")[0][0].rows) == 2
        with (tmp_path / "out/report.csv").open() as file:
            assert {row["percent"] for row in csv.DictReader(file)} == {"15.6"}


def test_lists_that_were_made_for_a_percentage_stand_under_it(tmp_path: Path) -> None:
    """As STAC's, which draws with replacement: the folds of one percentage are one column."""
    split = {"percent": 10, "fold": 1, "index_file": "lists/{percent}-{fold}.json"}
    for fold, labeled in ((1, 950), (2, 954)):
        record = _record(f"f{fold}", "supervised", protocol="ids", labeled_images=labeled, unlabeled_images=9000)
        record.config, record.fold, record.split_sha256 = {"split": split}, fold, str(fold)
        write_record(tmp_path / f"runs/{fold}/record.json", record)
    assert "| method | 10 % (ids) (950 to 954 images) |" in _report(tmp_path)


def test_share_that_nobody_knows(tmp_path: Path) -> None:
    record = _record("a", "supervised", percent=None, labeled_images=0, unlabeled_images=0)
    write_record(tmp_path / "runs/quick/a/record.json", record)
    text = _report(tmp_path)
    assert "| method | share unknown" in text
    assert "ap_by_ratio" not in text


def test_full_is_all_labels_of_its_own_set(tmp_path: Path) -> None:
    for percent in (None, 100.0, 49.0):
        write_record(
            tmp_path / "runs/quick/a/record.json", _record("a", "supervised", protocol="full", percent=percent)
        )
        assert "| method | 100 % (full)" in _report(tmp_path)


def test_planned_cell_of_ids_stands_with_the_others(tmp_path: Path) -> None:
    make(tmp_path)
    ids = {"protocol": "ids", "labeled_images": 20, "unlabeled_images": 108, "split_sha256": "s", "percent": None}
    for name, cell, method in ((FILES[0], "a", "supervised"), (FILES[1], "b", "stac")):
        write_record(tmp_path / name, _record(cell, method, **ids))
    plan = (tmp_path / FILES[3]).read_text().replace("soft_teacher", "ids")
    (tmp_path / FILES[3]).write_text(plan)
    section = tables.load(tmp_path / "runs")[0][0]
    assert section.percents == [15.6]
    assert [run.record.cell for run in section.missing] == ["c"]


def test_unknown_quality_is_not_zero(tmp_path: Path) -> None:
    make(tmp_path)
    write_record(tmp_path / FILES[0], _record("a", "supervised", batch_unlabeled=0))
    write_record(tmp_path / FILES[1], _record("b", "stac", pseudo_precision=None))
    (tmp_path / FILES[2]).unlink()
    text = _report(tmp_path)
    assert "| STAC | 10 % | unknown | unknown | unknown |" in text
    assert "| Supervised | 10 % | unknown" not in text
    assert "unknown" in (tmp_path / "out/report.html").read_text()


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.open = "", []  # type: ignore[var-annotated]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


ODD = ["[/x]", "$x_{y$", "a|b", "</table><script>alert(1)</script>", "=1+1", "\\end{table} 50%", "a\nb\r\n| c |", "`*_"]


def test_odd_names_in_every_form(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["dataset", "protocol", "detector", "pretraining", "preset", "pipeline", "reported_network", "commit"]
    odd = dict(zip(names, ODD, strict=True))
    for fold, (cell, method) in enumerate((("[/x]", "supervised"), ("=b", "$x_{y$ | [bold]"), ("c", "stac")), 1):
        odd["per_class"] = {"</td>|$x_{": {"ap": 1.0}}  # type: ignore[assignment]
        failed = {"status": "failed", "error": "[/red] $\\frac$\n| a | b |", "ap": None} if cell == "c" else {}
        record = _record(
            cell, method, suite="[/s]|", environment={"cpu": "<i>", "gpus": ["$\x1b[31m"]}, **odd, **failed
        )
        write_record(tmp_path / f"runs/{fold}/record.json", record)
    bad = tmp_path / "runs" / os.fsdecode(b"na|me \xff [x] <b>")
    bad.mkdir()
    (bad / "record.json").write_text("{")
    page = report.run(tmp_path / "runs", tmp_path / "out")
    reader = _Text()
    reader.feed(page.read_text())
    assert reader.open == []
    assert "</table><script>alert(1)</script>" in reader.text
    assert "$X {Y$ | [Bold]" in reader.text
    _every_table_keeps_its_columns(page.with_suffix(".md").read_text())
    with page.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["dataset"] for row in rows} == {"[/x]"}
    assert {row["preset"] for row in rows} == {"'=1+1"}
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "@"))]
    tex = page.with_suffix(".tex").read_text()
    assert tex.count(r"\end{table}") == tex.count(r"\begin{table}") == 3
    assert page.read_text().count("<script") == 1  # its own
    capfd.readouterr()
    assert main(["report", f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'out'}"]) == 0


def _every_table_keeps_its_columns(text: str) -> None:
    columns = None
    for line in text.splitlines():
        columns = None if not line.startswith("|") else line.count("|") if columns is None else columns
        assert columns is None or line.count("|") == columns, line


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_table_on_any_terminal(tmp_path: Path, encoding: str) -> None:
    make(tmp_path)
    write_record(tmp_path / FILES[0], _record("a", "supervised", dataset="[/x] \N{GRINNING FACE}", suite="[bold]s"))
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    never_refuse(stream)
    report.show(tmp_path / "runs", Console(file=stream, width=120))
    stream.flush()
    text = written.getvalue().decode(encoding)
    assert "[/x]" in text
    assert "[bold]s" in text
    assert ("mean ± standard" in text) == (encoding != "ascii")
    assert ("mean +/- standard" in text) == (encoding == "ascii")


def test_struct_of_the_plan_is_what_the_suite_writes() -> None:
    cfg = compose.load(["suite=smoke", "suite.percents=[50]"])
    written: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "write_atomically", lambda _, content: written.append(content))
        plan.write_plan(Path("x"), cfg, plan.plan(cfg))
    planned = msgspec.json.decode(written[0], type=readback.Plan)
    assert {cell.method for cell in planned.cells} == set(cfg.suite.methods)
