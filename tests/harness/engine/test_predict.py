"""`predict` against the predictions that a run wrote of its own evaluation pictures, and on files of every kind."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from harness.cli import main
from harness.core.types import UserError
from harness.engine import predict

pytestmark = pytest.mark.timeout(120)


def detect(run: Path, images: Path | str, out: Path, *more: str) -> int:
    return main(["predict", f"run_dir={run}", f"images={images}", f"out={out}", "predict.score=0.02", *more])


def rows_of(path: Path) -> list[dict]:
    return json.loads((path / "predictions.json").read_text())


def test_boxes_are_those_of_the_runs_own_evaluation(pets_run: Path, tmp_path: Path) -> None:
    assert detect(pets_run, pets_run.parent / "val", tmp_path) == 0
    own = json.loads((pets_run / "predictions.json").read_text())
    found = rows_of(tmp_path)
    assert len(found) == len(own) > 0
    for mine, reference in zip(found, own, strict=True):
        assert int(mine["file_name"].removesuffix(".jpg")) == reference["image_id"]
        assert mine["category_id"] == reference["category_id"]
        assert mine["category_name"] == {3: "cat", 8: "dog"}[reference["category_id"]]
        assert mine["score"] == pytest.approx(reference["score"], abs=1e-4)
        assert mine["bbox"] == pytest.approx(reference["bbox"], abs=0.02)


def test_results_can_be_opened_by_pycocotools(pets_run: Path, tmp_path: Path) -> None:
    assert detect(pets_run, pets_run.parent / "val", tmp_path) == 0
    coco = COCO(tmp_path / "images.json")
    loaded = coco.loadRes(str(tmp_path / "predictions.json"))
    assert sorted(loaded.getImgIds()) == [1, 2, 3, 4]
    assert {coco.cats[i]["name"] for i in coco.cats} == {"cat", "dog"}
    assert len(loaded.anns) == len(rows_of(tmp_path))


def test_student_and_teacher_can_be_asked_for(pets_run: Path, tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        assert detect(pets_run, pets_run.parent / "val", tmp_path / name, f"network={name}") == 0
    assert rows_of(tmp_path / "student") != rows_of(tmp_path / "teacher")


def test_pictures_keep_resolution_format_and_names(pets_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "deep er"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 255, (90, 130, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels).save(folder / "größe.png")
    Image.fromarray(pixels[..., 0]).save(folder / "gray.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "photos" / "palette.png")
    assert detect(pets_run, tmp_path / "photos", tmp_path / "out") == 0
    names = ["deep er/a.jpg", "deep er/größe.png", "deep er/gray.png", "palette.png"]
    for name in names:
        with Image.open(tmp_path / "out" / "pictures" / name) as image:
            assert image.size == (130, 90)
            assert image.mode == "RGB"
            assert image.format == {"jpg": "JPEG", "png": "PNG"}[name[-3:]]
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert sorted(image["file_name"] for image in images) == sorted(names)


def test_a_rotated_picture_is_detected_as_stored_and_shown_upright(pets_run: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = Image.open(pets_run.parent / "val" / "001.jpg").resize((80, 60))
    source.save(tmp_path / "in" / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    source.save(tmp_path / "in" / "rotated.png", exif=exif)
    assert detect(pets_run, tmp_path / "in", tmp_path / "out") == 0
    by_name: dict[str, list] = {"plain.png": [], "rotated.png": []}
    for row in rows_of(tmp_path / "out"):
        by_name[row["file_name"]].append((row["bbox"], row["score"]))
    assert by_name["plain.png"] == by_name["rotated.png"] != []
    with Image.open(tmp_path / "out" / "pictures" / "rotated.png") as shown:
        assert shown.size == (60, 80)
        assert shown.getexif().get(0x0112, 1) == 1  # no viewer turns it once more


def test_files_that_cannot_be_read_are_named_and_the_others_done(
    pets_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(pets_run.parent / "val", folder)
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture")
    whole = (folder / "001.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    assert detect(pets_run, folder, tmp_path / "out") == 0
    said = capsys.readouterr().err
    listed = json.loads((tmp_path / "out" / "images.json").read_text())
    assert {row["file_name"] for row in listed["skipped"]} == {"empty.jpg", "text.jpg", "half.jpg"}
    assert len(listed["images"]) == 4
    for name in ("empty.jpg", "text.jpg", "half.jpg"):
        assert f"skipped: {name}" in said


def test_own_results_are_not_looked_at_again(pets_run: Path, tmp_path: Path) -> None:
    shutil.copytree(pets_run.parent / "val", tmp_path / "photos")
    for _ in range(2):
        assert detect(pets_run, tmp_path / "photos", tmp_path / "photos" / "found") == 0
        listed = json.loads((tmp_path / "photos" / "found" / "images.json").read_text())
        assert len(listed["images"]) == 4


def test_pictures_are_found_by_file_folder_pattern_and_list(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.JPG", "c.txt", "[x].png", "deep/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*given: str) -> list[str]:
        return [picture.name for picture in predict.find_pictures([str(tmp_path / entry) for entry in given])]

    assert names("") == ["[x].png", "a.jpg", "b.JPG", "deep/d.jpg"]
    assert names("a.jpg") == ["a.jpg"]
    assert names("[x].png") == ["[x].png"]
    assert names("*.jpg") == ["a.jpg"]
    assert names("**/*.jpg") == ["a.jpg", "deep/d.jpg"]
    assert names("a.jpg", "*.jpg", "deep") == ["a.jpg", "deep/d.jpg"]
    with pytest.raises(UserError, match=r"c\.txt is no picture"):
        names("c.txt")
    with pytest.raises(UserError, match="holds no picture"):
        names("*.bmp")
    with pytest.raises(UserError, match="is not there"):
        names("e.jpg")


def test_a_run_without_dali_needs_none_afterwards(
    pets_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nvidia.dali" else found(name))
    assert detect(pets_run, pets_run.parent / "val", tmp_path) == 0
    assert detect(pets_run, pets_run.parent / "val", tmp_path, "pipeline=dali") == 2
    assert "pipeline=torchvision" in capsys.readouterr().err
