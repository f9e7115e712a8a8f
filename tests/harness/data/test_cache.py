"""Cached folders: built once, never half, again when damaged."""

import subprocess
import sys

import pytest

from harness.core.types import UserError
from harness.data.cache import build_once, cached_folder, is_whole


def build(folder):
    (folder / "a.txt").write_text("content")
    (folder / "many").mkdir()
    for number in range(3):
        (folder / "many" / str(number)).write_text("x" * number)


def test_a_folder_is_built_once_per_parameters(tmp_path):
    builds = []

    def counted(folder):
        builds.append(folder)
        build(folder)

    first = build_once(tmp_path / "kind", {"size": 1}, counted)
    assert first == cached_folder(tmp_path / "kind", {"size": 1})
    assert build_once(tmp_path / "kind", {"size": 1}, counted) == first
    assert len(builds) == 1
    second = build_once(tmp_path / "kind", {"size": 2}, counted)
    assert second != first
    assert len(builds) == 2
    assert is_whole(first)
    assert is_whole(second)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a.txt").write_text("conten!"),
        lambda folder: (folder / "a.txt").unlink(),
        lambda folder: (folder / "many" / "1").unlink(),
        lambda folder: (folder / "many" / "2").write_text(""),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"conte'),
    ],
)
def test_a_damaged_folder_is_built_again(tmp_path, damage):
    folder = build_once(tmp_path, {}, build)
    damage(folder)
    assert not is_whole(folder)
    assert build_once(tmp_path, {}, build) == folder
    assert is_whole(folder)
    assert (folder / "a.txt").read_text() == "content"


def test_a_failed_build_leaves_nothing_that_is_used(tmp_path):
    def fails(folder):
        (folder / "junk.txt").write_text("half")
        raise RuntimeError("out of paint")

    with pytest.raises(RuntimeError, match="out of paint"):
        build_once(tmp_path, {}, fails)
    assert not cached_folder(tmp_path, {}).exists()
    folder = build_once(tmp_path, {}, build)
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "manifest.json", "many"]


@pytest.mark.timeout(120)
def test_processes_at_the_same_time_build_once(tmp_path):
    code = f"""
import time
from pathlib import Path
from harness.data.cache import build_once

def build(folder):
    with open({str(tmp_path / "builds")!r}, "a") as log:
        log.write("x")
    (folder / "a.txt").write_text("one")
    time.sleep(0.5)
    (folder / "b.txt").write_text("two")

folder = build_once(Path({str(tmp_path / "cache")!r}), {{}}, build)
assert (folder / "b.txt").read_text() == "two"
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir"):
        build_once(tmp_path / "file" / "kind", {}, build)
