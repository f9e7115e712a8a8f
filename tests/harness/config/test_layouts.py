"""What is said to a user who gives a path: the settings that are named must read what lies there."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from harness import cli
from harness.config import layouts
from tests.bad_input.annotations import XML
from tests.bad_input.conftest import make_pets


def custom(root: Path) -> None:
    make_pets(root)


def roboflow(root: Path) -> None:
    make_pets(root)
    for part, name in (("train", "train"), ("val", "valid")):
        shutil.move(root / f"{part}.json", root / part / "_annotations.coco.json")
        (root / part).rename(root / name)


def coco(root: Path) -> None:
    make_pets(root)
    (root / "annotations").mkdir()
    for part in ("train", "val"):
        (root / part).rename(root / f"{part}2017")
        (root / f"{part}.json").rename(root / "annotations" / f"instances_{part}2017.json")


def voc(root: Path) -> None:
    make_pets(root)
    for name in ("Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for part in ("train", "val"):
        stems = [path.stem for path in sorted((root / part).iterdir())][:4]
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(stems))
        for stem in stems:
            (root / "Annotations" / f"{stem}.xml").write_text(XML.format(stem))
        (root / f"{part}.json").unlink()
    (root / "ImageSets" / "Main" / "cat_train.txt").write_text("001 1\n")
    (root / "train").rename(root / "JPEGImages")


def yolo(root: Path) -> None:
    make_pets(root)
    for part in ("train", "val"):
        (root / f"{part}.json").unlink()
        (root / "images").mkdir(exist_ok=True)
        (root / part).rename(root / "images" / part)
        (root / "labels" / part).mkdir(parents=True)
        for picture in (root / "images" / part).iterdir():
            (root / "labels" / part / f"{picture.stem}.txt").write_text("0 0.4 0.4 0.3 0.3")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")


@pytest.mark.parametrize("make", [custom, roboflow, coco, voc, yolo])
def test_suggested_settings_read_the_folder(tmp_path: Path, make: type, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "my data"
    make(root)
    said = layouts.suggestion(root)
    assert said is not None
    assert said.startswith("say data=")
    settings = shlex.split(said.removeprefix("say "))
    cache = f"cache_dir={tmp_path}/cache"
    assert cli.main(["prepare", *settings, "split.percent=50", cache]) == 0, capsys.readouterr().err
    assert cli.main(["prepare", f"data={root}", cache]) == 2
    assert said in capsys.readouterr().err


def test_suggested_settings_read_a_folder_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pets(tmp_path / "pets")
    shutil.copytree(tmp_path / "pets" / "train", tmp_path / "more" / "of them")
    said = layouts.suggestion(tmp_path / "more") or ""
    settings = shlex.split(said.partition("say ")[2].replace("DIR", str(tmp_path / "pets")))
    assert cli.main(["prepare", *settings, f"cache_dir={tmp_path}/cache"]) == 0, capsys.readouterr().err
    assert "unlabeled" in capsys.readouterr().out


def test_what_is_not_known_gets_no_suggestion(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert layouts.suggestion(tmp_path) is None
    assert layouts.suggestion(tmp_path / "nowhere") is None
    make_pets(tmp_path)
    assert layouts.suggestion(tmp_path, tried="custom") is None
    assert layouts.suggestion(tmp_path, but="coco") is None


def test_options_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that happens to have an option's name is not meant, be it ours or the user's."""
    monkeypatch.chdir(tmp_path)
    for name in ("coco", "tools"):
        (tmp_path / name).mkdir()
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "tools.yaml").write_text("defaults: [coco]")
    layouts.check_option(["data=coco", "data.root=tools", "method=stac", "data="], [])
    layouts.check_option(["data=tools"], ["conf"])
    with pytest.raises(layouts.UserError, match="data=tools is a path"):
        layouts.check_option(["data=tools"], [])
