"""Files: whole or not at all, regular or refused; and what the system refuses, as a sentence."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from harness.core import files
from harness.core.types import RunError, UserError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["folder", "fifo", "socket", "device", "link to a device"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "x"
    if request.param == "folder":
        path.mkdir()
    elif request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif request.param == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        path = Path("/dev/null")
    return path


def test_nothing_but_a_regular_file_is_read_or_replaced(irregular: Path) -> None:
    before = os.lstat(irregular)
    for function in (
        files.require_regular,
        files.read_bytes,
        files.open_to_read,
        files.open_to_append,
        lambda path: files.write_atomically(path, b""),
    ):
        with pytest.raises(OSError, match=r"Not a regular file|Is a directory") as error:
            function(irregular)
        assert error.value.filename == str(irregular)
    after = os.lstat(irregular)
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "folder" / "x"
    files.write_atomically(path, b"old")
    assert path.read_bytes() == b"old"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with files.replacing(path) as file:
            file.write(b"new")
            if step == "write":
                full()

    with monkeypatch.context() as patch:
        if step != "write":
            patch.setattr(Path if step == "open" else os, step, full)
        with pytest.raises(OSError, match="No space left") as error:
            write()
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["x"]


def test_an_error_within_a_block_keeps_the_name_of_another_file(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "in"
    with pytest.raises(FileNotFoundError) as error, files.replacing(tmp_path / "out" / "x"):
        other.read_bytes()
    assert error.value.filename == str(other)


def test_appending_makes_the_folder_and_keeps_what_is_there(tmp_path: Path) -> None:
    for part in (b"one", b"two"):
        with files.open_to_append(tmp_path / "a" / "log") as file:
            file.write(part)
    assert (tmp_path / "a" / "log").read_bytes() == b"onetwo"


PLACES = {"runs_dir": "/data/runs", "run_dir": "/data/runs/x", "cache_dir": "/cache", "out": None, "data.root": "rel"}


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/data/runs/x/record.json", "run_dir"),
        ("/data/runs/y/record.json", "runs_dir"),
        ("/data/runs", "runs_dir"),
        ("/cache/shapes/1", "cache_dir"),
        ("/data", "runs_dir"),  # a part of it cannot be made
        ("/cached", None),
        ("/etc/x", None),
        ("rel/train.json", "data.root"),
        (None, None),
    ],
)
def test_the_key_under_whose_path_something_happened(path: str | None, key: str | None) -> None:
    assert files.key_of(path, PLACES) == key


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, RunError, "free space on that disk"),
        (errno.EDQUOT, RunError, "quota"),
        (errno.EIO, RunError, "disk fails"),
        (errno.EMFILE, RunError, "ulimit -n"),
        (errno.EROFS, UserError, "that can be written, by cache_dir=PATH"),
        (errno.EACCES, UserError, "permissions, by cache_dir=PATH"),
        (errno.ELOOP, UserError, "symbolic links"),
        (errno.ENAMETOOLONG, UserError, "shorter names, by cache_dir=PATH"),
        (errno.EXDEV, UserError, "give another"),
    ],
)
def test_a_refusal_names_path_cause_remedy_and_key(code: int, kind: type[Exception], words: str) -> None:
    told = files.refusal(OSError(code, os.strerror(code), "/cache/a"), PLACES)
    assert type(told) is kind
    assert f"/cache/a ({os.strerror(code)})" in str(told)
    assert words in str(told)


def test_a_refusal_without_anything_known_is_a_sentence_still() -> None:
    assert "cannot use a file (odd)" in str(files.refusal(OSError("odd")))
    assert "cannot use a file (OSError)" in str(files.refusal(OSError()))
    assert "7" not in str(files.refusal(OSError(errno.EIO, "broken", 7)))  # a descriptor is no name


def test_home_is_expanded_and_nobody_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert files.home_path("~/x", "out") == "/home/me/x"
    assert files.home_path("~", "out") == "/home/me"
    assert files.home_path("~root", "out") == os.path.expanduser("~root")
    for same in ("x", "./~", "a/~/b", "/~"):
        assert files.home_path(same, "out") == same
    with pytest.raises(UserError, match=r"out=~no-such-user/x .* \./~no-such-user/x"):
        files.home_path("~no-such-user/x", "out")


def test_shared_memory_is_asked_for_before_it_is_missed() -> None:
    files.require_shared_memory(1, "what", "remedy")
    with pytest.raises(UserError, match=r"what needs .* MiB of shared memory.*or remedy"):
        files.require_shared_memory(1 << 62, "what", "remedy")


def test_what_can_be_written_is_not_made_yet(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "a" / "b", "out")
    files.require_writable(tmp_path / "a" / "b", "out", folder=True)
    files.require_writable(tmp_path, "out", folder=True)
    assert os.listdir(tmp_path) == []
