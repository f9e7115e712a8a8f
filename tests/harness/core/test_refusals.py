"""What only a process of its own shows: another user, closed and full outputs, a working folder with modules in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.conftest import make_pets

pytestmark = pytest.mark.timeout(240)

SSODBENCH = [sys.executable, "-P", "-m", "harness.cli"]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def run(arguments: list[str], cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SSODBENCH_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment} | options
    return subprocess.run([*SSODBENCH, *arguments], cwd=cwd, text=True, timeout=200, **given)


# Runs the command twice: as this user, and then as one whom permissions stop (they do not stop the superuser). What
# Python loads is loaded by then, so that the other user need not be able to read this installation.
AS_ANOTHER = """
import os, shutil, sys
from harness.cli import main
folder, *command = sys.argv[1:]
assert main(command) == 0
shutil.rmtree(os.path.join(folder, "cache/annotations/stamps"))
for parent, _, _ in os.walk(folder):
    os.chmod(parent, 0o555)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
print("as another", flush=True)
assert main(command) == 0
sys.exit(main([*command, f"cache_dir={folder}/other"]))
"""


def test_a_cache_that_can_only_be_read_works(open_folder: Path) -> None:
    """Its stamps cannot be written, nor are they needed; one that is not there is told."""
    make_pets(open_folder / "pets")
    command = ["prepare", "data=custom", f"data.root={open_folder / 'pets'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SSODBENCH_CACHE": str(open_folder / "cache")}
    words = [sys.executable, "-c", AS_ANOTHER, str(open_folder), *command]
    done = subprocess.run(words, cwd=open_folder, env=environment, capture_output=True, text=True, check=False)
    for folder, _, _ in os.walk(open_folder):
        Path(folder).chmod(0o755)
    assert done.returncode == 2, done.stderr
    first, again = done.stdout.split("as another")
    assert "wrote" in first
    assert "not written to the cache" in again
    assert not (open_folder / "cache" / "annotations" / "stamps").exists()
    assert done.stderr.startswith(f"ssodbench: cannot use {open_folder / 'other'}")
    assert done.stderr.rstrip().endswith("by cache_dir=PATH")


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [(">&-", 1, "the standard output"), (">/dev/full", 1, "cannot write the output"), ("| head -n 1", 0, "")],
)
def test_an_output_that_cannot_be_written(tmp_path: Path, redirection: str, code: int, words: str) -> None:
    line = f"set -o pipefail; {' '.join(SSODBENCH)} config {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (done.stderr.count("\n"), words in done.stderr) == (int(code != 0), True), done.stderr


def test_closed_outputs_do_not_lend_their_numbers_to_files(tmp_path: Path) -> None:
    make_pets(tmp_path / "pets")
    line = f"{' '.join(SSODBENCH)} prepare data=custom data.root=pets cache_dir=cache export_dir=out >&- 2>&- <&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=False).returncode == 0
    assert (tmp_path / "out" / "prepared.json").read_text().startswith("{")


def test_an_ascii_terminal_gets_its_table(tmp_path: Path) -> None:
    make_pets(tmp_path / "pets")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = ["prepare", "data=custom", "data.root=pets", "cache_dir=cache", "export_dir=öut"]
    done = run(command, tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert r"wrote \xf6ut/prepared.json" in done.stdout


def test_cells_take_no_module_from_the_working_folder(tmp_path: Path) -> None:
    """Nor does `ssodbench`, whose own folder comes first; a cell is started by -m, which the working folder would."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    from harness.suite import cells

    command = [*cells.train_command()[:-1], "config"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs_dir" in done.stdout
