"""`ssodbench init`: the commands that it prints work as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from harness import cli
from tests.harness.commands.test_prepare import coco, draw, yolo

pytestmark = pytest.mark.timeout(120)


def printed_commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  ssodbench ")]


def test_without_pictures_to_evaluate_some_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    yolo(tmp_path / "apples")
    for number in range(8):
        draw(tmp_path / "apples" / "images" / "train" / f"{number}.jpg")
        (tmp_path / "apples" / "labels" / "train" / f"{number}.txt").write_text("0 .5 .5 .5 .5")
    (tmp_path / "apples" / "data.yaml").write_text(yaml.safe_dump({"train": "images/train", "names": ["a", "b"]}))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "apples", "cache_dir=cache"]) == 0
    out = capsys.readouterr().out
    assert "10 pictures to train on, with 11 boxes, none to evaluate, 2 classes (a, b)" in out
    prepare, train = printed_commands(out)
    assert {"split.holdout=0.2", "split.percent=100"} <= set(prepare)
    assert train[2:] == [*prepare[2:4], "method=supervised", *prepare[4:], "preset=photos"]
    assert cli.main([*prepare, "cache_dir=cache", "export_dir=out"]) == 0
    out = capsys.readouterr().out
    assert "8 pictures to train on with 9 boxes; 2 pictures to evaluate on" in out
    assert "2 images to evaluate on: AP of so few is mostly chance; give a larger split.holdout" in out


def test_with_pictures_to_evaluate_none_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coco(tmp_path / "apples", ["one", "two"], [1, 2])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "apples", "cache_dir=cache"]) == 0
    out = capsys.readouterr().out
    assert "2 pictures to train on, with 3 boxes, 1 to evaluate, 2 classes (one, two)" in out
    assert "holdout" not in out
    *_, compare = printed_commands(out)
    assert compare[0] == "suite"
    assert cli.main(["config", *compare[1:], "cache_dir=cache"]) == 0
    assert "name: apples" in capsys.readouterr().out
