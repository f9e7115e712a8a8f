"""A flipped bit is found in whatever is read back: checkpoints, pseudo labels, backbones, annotations."""

from __future__ import annotations

import io
import random
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.core import checksum
from harness.core.types import ImageSource, UserError
from harness.data.cache import build_once, is_whole
from harness.engine import checkpoint, label_file, offline

FLIPS = 300


def _checkpoint(folder: Path) -> Path:
    state = {"step": 3, "method": {"w": torch.randn(40, 7)}, "identity": {"config": "c", "stage 1": None}}
    return checkpoint.save(folder, state, keep=2, keep_every=None)


def _labels(folder: Path) -> Path:
    source = ImageSource(
        paths=["a.jpg", "b.jpg"],
        ids=np.array([4, 9]),
        sizes=np.array([[8, 8], [8, 8]]),
        boxes=np.array([[0, 0, 4, 4]], np.float32),
        labels=np.array([1]),
        scores=np.array([0.9], np.float32),
        offsets=np.array([0, 1, 1]),
    )
    label_file.write_label_file(folder / "pseudo_labels.npz", source, {"stage 1": "x"}, 7)
    return folder / "pseudo_labels.npz"


def _flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _bits(path: Path, seed: int) -> list[int]:
    """Bits at random places, and every one of the last 64 bytes, where the checksum and the archive's end are."""
    count = 8 * path.stat().st_size
    return [*random.Random(seed).sample(range(count), FLIPS), *range(count - 8 * 64, count)]


@pytest.mark.parametrize("make", [_checkpoint, _labels])
def test_any_flipped_bit_is_found(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    checksum.verify(path)
    for bit in _bits(path, seed=1):
        _flip(path, bit)
        with pytest.raises(checksum.Damaged):
            checksum.verify(path)
        _flip(path, bit)
    checksum.verify(path)


def test_the_sum_is_the_crc_of_what_lies_before_it(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path)
    content, _, line = path.read_bytes().rpartition(b"\n" + b"ssodbench-crc32 ")
    assert int(line, 16) == zlib.crc32(content)
    assert torch.load(io.BytesIO(content), weights_only=True)["step"] == 3
    labels = _labels(tmp_path).read_bytes()
    content, _, line = labels.rpartition(b"\n" + b"ssodbench-crc32 ")
    assert int(line, 16) == zlib.crc32(content)
    assert checksum.sealed(content) == labels


def test_others_read_sealed_files(tmp_path: Path) -> None:
    assert torch.load(_checkpoint(tmp_path), weights_only=True)["step"] == 3
    with np.load(_labels(tmp_path)) as arrays:
        assert arrays["ids"].tolist() == [4, 9]


@pytest.mark.parametrize("length", [0, 1, 24, 25, 26, 400])
def test_what_is_cut_short_is_found(tmp_path: Path, length: int) -> None:
    path = _checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(checksum.Damaged):
        checksum.verify(path)


def test_files_from_before_are_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-00000003.pt"
    path.parent.mkdir()
    torch.save({"step": 3, "method": {}, "identity": {}}, path)
    assert checkpoint.read(path)["step"] == 3
    none = {"ids": np.zeros(0, np.int64), "labels": np.zeros(0, np.int64), "scores": np.zeros(0, np.float32)}
    none |= {"boxes": np.zeros((0, 4), np.float32), "offsets": np.zeros(1, np.int64)}
    np.savez(tmp_path / "old.npz", **none, made_by='{"stage 1": "x"}', steps=3)
    assert offline._are_there(tmp_path / "old.npz", {"stage 1": "x"})
    assert zipfile.is_zipfile(tmp_path / "old.npz")


def test_flipped_checkpoint_is_named_and_the_older_one_taken(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"step": 2, "method": {"w": torch.ones(9)}, "identity": {}}, keep=2, keep_every=None)
    newest = _checkpoint(tmp_path)
    weights = torch.load(newest, weights_only=True)["method"]["w"].numpy().tobytes()
    _flip(newest, 8 * newest.read_bytes().index(weights) + 100)
    assert torch.load(newest, weights_only=True)["step"] == 3  # torch sees nothing
    with pytest.warns(UserWarning, match=r"step-00000003.pt is damaged \(its checksum does not match\)"):
        state = checkpoint.newest(tmp_path)
    assert state is not None
    assert state["step"] == 2
    with pytest.raises(UserError, match="checksum"):
        checkpoint.read(newest)


def test_flipped_labels_are_named_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _labels(tmp_path)
    assert offline._are_there(path, {"stage 1": "x"})
    assert not offline._are_there(path, {"stage 1": "y"})
    assert not caplog.text
    _flip(path, 4000)
    assert not offline._are_there(path, {"stage 1": "x"})
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize("name", ["weights.pt", "arrays.npz", "manifest.json"])
def test_flipped_bit_in_a_cache_is_named_and_built_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def build(folder: Path) -> None:
        torch.save({"w": torch.arange(50.0)}, folder / "weights.pt")
        np.savez(folder / "arrays.npz", boxes=np.arange(60.0))

    parameters = {"size": 40, "sha256": "ab" * 20}
    folder = build_once(tmp_path, parameters, build)
    good = (folder / name).read_bytes()
    assert is_whole(folder)
    for bit in random.Random(2).sample(range(8 * len(good)), 100):
        _flip(folder / name, bit)
        assert not is_whole(folder), bit
        _flip(folder / name, bit)
    _flip(folder / name, 800)
    assert build_once(tmp_path, parameters, build) == folder
    assert (folder / name).read_bytes() == good
    assert f"{folder} is damaged" in caplog.text
