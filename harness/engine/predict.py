"""A trained network on anybody's pictures: boxes drawn on them, and the same boxes as COCO results."""

from __future__ import annotations

import glob
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image, ImageOps

from harness.config.layouts import SUFFIXES
from harness.core.escape import plain
from harness.core.files import home_path, require_regular, trouble, write_atomically
from harness.core.types import ImageSource, Pipeline, Target, UserError
from harness.data.images import list_pictures, read_sizes
from harness.engine import annotate
from harness.engine.evaluate import detect_all
from harness.engine.trained import Trained

_AHEAD = 8  # pictures that wait to be drawn, for each thread that draws
_QUALITY = 90  # of JPEG files
_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Picture:
    """A file to look at."""

    path: Path
    name: str  # below the folder that all of them share, with /


@dataclass
class Found:
    """What was found in pictures."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # COCO results, each with its file's name
    images: list[dict[str, Any]] = field(default_factory=list)  # id, file_name, width, height of those that were read
    skipped: dict[str, str] = field(default_factory=dict)  # file name -> why it could not be used
    seconds: float = 0.0


def find_pictures(given: str | Sequence[str], out: Path | None = None) -> list[Picture]:
    """The files that `images` names, sorted, each of them once.

    Args:
        given: a picture, a folder (and what is below it), a pattern, or several of them.
        out: a folder whose pictures do not count, because they are results.

    Raises:
        UserError: there is nothing.
    """
    entries = [given] if isinstance(given, str) else list(given)
    files = sorted({Path(os.path.abspath(file)) for entry in entries for file in _files(home_path(entry, "images"))})
    if out is not None:
        files = [file for file in files if not file.is_relative_to(out.absolute())]
    if not files:
        raise UserError(
            f"images={plain(','.join(entries))} holds no picture: give a file, a folder or a pattern in quotes "
            f"('photos/*.jpg') of pictures ({', '.join(SUFFIXES)})"
        )
    shared = os.path.commonpath([file.parent for file in files])
    return [Picture(file, os.path.relpath(file, shared).replace(os.sep, "/")) for file in files]


def _files(entry: str) -> Iterator[str]:
    path = Path(entry)
    if path.is_dir():
        yield from (str(path / name) for name, _ in list_pictures(path))
    elif os.path.lexists(path):
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"images={entry} is no picture: give files that end in {', '.join(SUFFIXES)}")
        yield entry
    elif glob.has_magic(entry):
        yield from (file for file in glob.glob(entry, recursive=True) if file.lower().endswith(SUFFIXES))
    else:
        raise UserError(
            f"images={entry} is not there ({trouble(path)}): give a file, a folder, or a pattern in quotes such as "
            "'photos/*.jpg'"
        )


def predict(
    trained: Trained,
    pictures: Sequence[Picture],
    feed: Pipeline,
    out: Path,
    score: float,
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Found:
    """Detects, draws and writes: `OUT/pictures/NAME`, `contact_sheet.jpg`, `predictions.json`, `images.json`.

    Pictures that cannot be read are left out and named in the result. What was found until then is written when the
    work is interrupted.

    Args:
        trained: the network.
        pictures: what to look at.
        feed: its pipeline.
        out: the folder for results.
        score: boxes with at most this score are left out.
        workers: threads that draw.
        advance: called with the number of pictures done since the last call.

    Raises:
        UserError: not one picture can be read.
        OSError: a result cannot be written.
    """
    begin, found = time.perf_counter(), Found()
    source, kept = source_of(pictures, workers, found)
    advance(len(found.skipped))
    small: dict[int, tuple[str, Image.Image]] = {}
    wanted = annotate.on_sheet(len(kept))
    waiting: deque[tuple[Picture, int, Target, Future[Image.Image | None]]] = deque()

    def collect() -> None:
        picture, image_id, target, drawn = waiting.popleft()
        advance(1)
        try:
            image = drawn.result()
        except _Unreadable as error:
            found.skipped[picture.name] = str(error)
            return
        if image is not None:
            small[image_id] = (picture.name, image)
        height, width = source.sizes[image_id - 1].tolist()
        found.images.append({"id": image_id, "file_name": picture.name, "width": width, "height": height})
        found.rows += _results(target, image_id, picture.name, trained)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for image_id, target in detect_all(trained.detector, feed.images(source), score):
                picture = kept[image_id - 1]
                if picture.path.as_posix() in feed.bad_images:
                    found.skipped[picture.name] = feed.bad_images[picture.path.as_posix()]
                    advance(1)
                    continue
                to = out / "pictures" / picture.name
                small_too = image_id - 1 in wanted
                job = pool.submit(_draw, picture, target, trained.about.classes, to, small_too)
                waiting.append((picture, image_id, target, job))
                if len(waiting) > _AHEAD * workers:
                    collect()
            while waiting:
                collect()
        finally:
            for *_, job in waiting:
                job.cancel()
            _write(out, found, trained, small)
    if not found.images:
        name, why = next(iter(found.skipped.items()))
        raise UserError(f"none of the {len(pictures)} pictures can be read, such as {name} ({why}): give others")
    found.seconds = time.perf_counter() - begin
    return found


class _Unreadable(Exception):  # noqa: N818  a finding, not an error of the program
    """A picture that cannot be drawn on, and why."""


def source_of(pictures: Sequence[Picture], workers: int, found: Found) -> tuple[ImageSource, list[Picture]]:
    """The pictures whose headers can be read; image i of the source has the id i + 1."""
    sizes = read_sizes([str(picture.path) for picture in pictures], workers)
    kept = [(picture, size) for picture, size in zip(pictures, sizes, strict=True) if not isinstance(size, str)]
    found.skipped = {p.name: size for p, size in zip(pictures, sizes, strict=True) if isinstance(size, str)}
    if not kept:
        name, why = next(iter(found.skipped.items()))
        raise UserError(f"none of the {len(pictures)} pictures can be read, such as {name} ({why}): give others")
    return (
        ImageSource(
            paths=[picture.path.as_posix() for picture, _ in kept],
            ids=np.arange(1, len(kept) + 1, dtype=np.int64),
            sizes=np.array([size for _, size in kept], np.int64),
            boxes=np.zeros((0, 4), np.float32),
            labels=np.zeros(0, np.int64),
            scores=np.zeros(0, np.float32),
            offsets=np.zeros(len(kept) + 1, np.int64),
            annotated=False,
        ),
        [picture for picture, _ in kept],
    )


def _results(target: Target, image_id: int, name: str, trained: Trained) -> Iterator[dict[str, Any]]:
    """COCO's result entries of one picture, in its stored pixels, best first."""
    for box, label, score in zip(target.boxes.tolist(), target.labels.tolist(), target.scores.tolist(), strict=True):
        x1, y1, x2, y2 = box
        yield {
            "image_id": image_id,
            "file_name": name,
            "category_id": trained.about.category_ids[label - 1],
            "category_name": trained.about.classes[label - 1],
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 5),
        }


def _draw(picture: Picture, target: Target, classes: Sequence[str], to: Path, small: bool) -> Image.Image | None:
    """Writes a picture with its boxes, upright, in its own resolution and format; gives a small one if asked to."""
    try:
        require_regular(picture.path)
        with Image.open(picture.path) as stored:
            orientation = int(stored.getexif().get(_ORIENTATION, 1))
            size, kind = stored.size, stored.format or "PNG"
            image = ImageOps.exif_transpose(_rgb(stored))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise _Unreadable("cannot be decoded") from error
    order = np.argsort(target.scores.numpy())  # the best lie above
    boxes = annotate.upright(target.boxes.numpy()[order], size, orientation)
    labels = target.labels.numpy()[order].tolist()
    scores = target.scores.numpy()[order].tolist()
    captions = [f"{plain(classes[label - 1])} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    little = annotate.thumbnail(image) if small else None
    annotate.draw_detections(image, boxes, labels, captions)
    if little is not None:  # drawn anew, so that names can be read
        annotate.draw_detections(little, boxes * (little.width / image.width), labels, captions)
    buffer = io.BytesIO()
    if kind in ("JPEG", "MPO"):
        image.save(buffer, "JPEG", quality=_QUALITY)
    else:
        image.save(buffer, kind if kind in ("PNG", "BMP", "WEBP", "TIFF") else "PNG", compress_level=1)
    write_atomically(to, buffer.getvalue(), durable=False)
    return little


def _rgb(stored: Image.Image) -> Image.Image:
    """8-bit RGB; of 16 bits the upper eight, as the pipelines read them."""
    exif = stored.getexif()
    if stored.mode.startswith("I"):
        values = np.asarray(stored).astype(np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    else:
        image = stored.convert("RGB")
    image.getexif().update(exif)
    return image


def _write(out: Path, found: Found, trained: Trained, small: dict[int, tuple[str, Image.Image]]) -> None:
    """The results beside the pictures, by image."""
    found.rows.sort(key=lambda row: (row["image_id"], -row["score"]))
    found.images.sort(key=lambda row: row["id"])
    about = trained.about
    named = zip(about.category_ids, about.classes, strict=True)
    content = {
        "images": found.images,
        "categories": [{"id": number, "name": name} for number, name in named],
        "skipped": [{"file_name": name, "why": why} for name, why in sorted(found.skipped.items())],
        "network": {
            "name": about.network,
            "cell": about.cell,
            "step": about.step,
            "config_sha256": about.config_sha256,
        },
    }
    write_atomically(out / "predictions.json", msgspec.json.encode(found.rows))
    write_atomically(out / "images.json", msgspec.json.format(msgspec.json.encode(content)))
    if small:
        buffer = io.BytesIO()
        page = annotate.sheet([small[number] for number in sorted(small)], len(found.images))
        page.save(buffer, "JPEG", quality=_QUALITY)
        write_atomically(out / "contact_sheet.jpg", buffer.getvalue(), durable=False)
