"""The healthy dataset that cases start from, and the run that carries out a case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.cli import main
from tests.bad_input.case import Case

CLASSES = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]


def make_pets(root: Path) -> None:
    """Writes the dataset that `Case` describes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        (root / part).mkdir(parents=True)
        images, annotations = [], []
        for number in range(1, count + 1):
            pixels = rng.integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(root / part / f"{number:03}.jpg")
            images.append({"id": number, "file_name": f"{number:03}.jpg", "width": 64, "height": 64})
            category = CLASSES[number % 2]["id"]
            box = {"id": number, "image_id": number, "category_id": category, "bbox": [8, 8, 24, 30], "area": 720}
            annotations.append({**box, "iscrowd": 0})
        content = {"images": images, "annotations": annotations, "categories": CLASSES}
        (root / f"{part}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pets")
    make_pets(folder)
    return folder


@pytest.fixture
def check(
    tmp_path: Path, pets: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[Case], None]:
    """Carries out a case in this process and looks at its exit code and its one sentence."""

    def run(case: Case) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SSODBENCH_CACHE", str(tmp_path.parent / "cache"))
        if case.prepare is not None:
            case.prepare(tmp_path)
        places = {"{tmp}": str(tmp_path), "{pets}": str(pets)}
        if case.patch is not None:
            case.patch(monkeypatch, tmp_path)
        command = case.command.split() if isinstance(case.command, str) else case.command
        capfd.readouterr()
        code = main([_fill(word, places) for word in command])
        monkeypatch.undo()
        out, err = capfd.readouterr()
        told = [line for line in err.splitlines() if line.startswith("ssodbench:")]
        assert code == case.code, (code, out, err)
        assert "Traceback" not in out + err, err
        assert len(told) == 1, err
        for name in (case.names,) if isinstance(case.names, str) else case.names:
            assert _fill(name, places) in told[0], (name, told[0])

    return run


def _fill(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text
