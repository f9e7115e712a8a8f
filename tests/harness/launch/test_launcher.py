"""Launchers are chosen by `_target_`: one of the user's own is a file and a YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli import main
from harness.config import compose
from harness.config.identity import config_sha256

OWN = '''
from typing import Annotated

from harness.core.validate import Limits


class Noting:
    """Starts nothing, and notes what it would start."""

    def __init__(self, queue: str, nodes: Annotated[int, Limits(ge=1)] = 1) -> None:
        self.queue, self.nodes = queue, nodes

    def run(self, cfg) -> int:
        with open(cfg.run_dir, "w") as file:
            file.write(f"{self.queue}: {self.nodes} x {cfg.devices} of {cfg.method.name}")
        return 7
'''
YAML = "_target_: own_launcher.Noting\nname: noting\nqueue: long\nnodes: 1\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "noting.yaml").write_text(YAML)
    (tmp_path / "own_launcher.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_launcher_of_ones_own_is_a_file_and_a_yaml(folder: Path) -> None:
    out = folder / "run"
    given = ["pipeline=torchvision", "launcher=noting", "launcher.nodes=2", "devices=4", "batch.micro=2"]
    assert main(["train", "--config-dir", str(folder), *given, f"run_dir={out}"]) == 7
    assert out.read_text() == "long: 2 x 4 of supervised"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("launcher.nodes=0", "launcher.nodes=0 must be a whole number of at least 1"),
        ("+launcher.ques=x", "launcher.ques is not known; did you mean queue"),
        ("~launcher.queue", "launcher.queue is missing"),
        ("launcher.nodes=3", "3 devices cannot share the 16 images"),
    ],
)
def test_its_keys_are_checked_before_anything_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    given = ["launcher=noting", "batch.micro=2", override, f"run_dir={folder / 'run'}"]
    assert main(["train", "--config-dir", str(folder), *given]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "run").exists()


def test_a_launcher_is_no_part_of_what_a_run_computes(folder: Path) -> None:
    own = compose.load(["launcher=noting"], [folder])
    assert config_sha256(own) == config_sha256(compose.load(["launcher=slurm"]))
