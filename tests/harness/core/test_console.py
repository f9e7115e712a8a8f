"""Output that cannot be written is lost, and nothing else is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from harness.core.console import Console

pytestmark = pytest.mark.timeout(120)


class Full(io.StringIO):
    """A file on a full disk, until there is room again."""

    room = False

    def write(self, text: str) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_what_cannot_be_written_is_lost_and_the_rest_is_not() -> None:
    file = Full()
    console = Console(file=file)
    console.say("lost")
    with Progress(console=console, disable=False) as bar:
        bar.advance(bar.add_task("lost too", total=2))
        file.room = True
        console.say("[not markup] kept")
    file.room = False
    assert "[not markup] kept\n" in file.getvalue()
    assert not file.getvalue().startswith("lost")


def test_closed_and_narrow_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    closed = io.StringIO()
    closed.close()
    Console(file=closed).say("x")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=ascii_only).say("Größe ≥ 3")
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"Gr??e ? 3\n"  # type: ignore[attr-defined]
    Console().say("out")
    Console(stderr=True).say("err")
    assert capsys.readouterr() == ("out\n", "err\n")


TRAIN = """
import sys
from harness.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _run(arguments: list[str], **streams: int | None) -> int:
    process = subprocess.Popen([sys.executable, "-c", TRAIN, *arguments], env={**os.environ}, **streams)  # type: ignore[call-overload]
    return int(process.wait(timeout=100))


@pytest.mark.parametrize("output", ["full", "closed pipe"])
def test_training_outlives_its_output(tmp_path: Path, output: str) -> None:
    small = ["data.train_images=20", "data.val_images=4", "detector.weights=scratch", "schedule=smoke", "device=cpu"]
    small += ["schedule.steps=3", "split.percent=20", "batch.labeled=2", "batch.unlabeled=0", "logging.loggers=[]"]
    command = ["train", *small, "logging.every=1", f"run_dir={tmp_path / 'run'}"]
    if output == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    assert _run(command, stdout=descriptor, stderr=descriptor) == 0
    os.close(descriptor)
    assert '"status": "ok"' in (tmp_path / "run" / "record.json").read_text()


def test_lost_configuration_is_told_and_a_gone_reader_is_not() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", TRAIN, "config"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert b"ssodbench: cannot write the output (No space left on device)" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    assert _run(["config"], stdout=writer) == 0
    os.close(writer)
