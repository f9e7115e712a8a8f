"""What a method sees: the views that a policy draws, and a teacher's pseudo labels beside the hidden truth."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, ImageDraw

from detectors.methods.method import Method
from harness.config import names as run_names
from harness.config import saved, sections
from harness.config.run import settings_of
from harness.core import boxes as box_ops
from harness.core import files
from harness.core.distributed import World
from harness.core.draws import image_keys
from harness.core.escape import plain
from harness.core.types import Batch, ImageSource, Normalize, Target, UserError, View
from harness.data import prepare
from harness.engine import annotate, build, checkpoint, trained
from harness.engine.annotate import Color
from harness.engine.taught import Labelled, label_batch, parts_of, sort_out
from pipelines.policy import Policy

_SMALLEST_PANEL = 260  # px of a panel's short side, to which small views are enlarged by whole factors
_LARGEST_PANEL = 520  # px of its long side
_REJECTED: Color = (150, 150, 150)
_WORDS = {"pseudo": "as the teacher labels offline"}


@dataclass
class ViewPanel:
    """A picture with a line above it, and lines below."""

    title: str
    image: Image.Image
    notes: list[str] = field(default_factory=list)


@dataclass
class Page:
    """Rows of panels, one row for each picture."""

    title: str
    about: list[str]
    rows: list[tuple[str, list[ViewPanel]]]  # the picture's name, and its panels


def views(cfg: DictConfig, world: World) -> Page:
    """Labelled pictures as they are stored and in every view of the policy, boxes mapped by the views' matrices.

    Args:
        cfg: a training's configuration; `view.images` pictures and `view.draws` draws of each view are shown.
        world: this process.
    """
    opened = build.divided_dataset(cfg)
    drawn = sections.split_options(cfg)
    split = prepare.resolve_split(opened, drawn)
    labeled, _ = prepare.sources(opened, split, drawn)
    names = list(opened.train.category_names)
    own = trained.detector_options(sections.group(cfg, "detector"), "")
    detector = trained.bare_detector(own, len(names), cfg.cache_dir)
    options = sections.feed_options(cfg)
    feed, policy = build.pipeline(options, world, detector.normalize), Policy.from_config(options.augment)
    positions = np.unique(np.linspace(0, len(labeled) - 1, min(len(labeled), int(cfg.view.images))).astype(np.int64))
    rows = [(Path(labeled.paths[p]).name, [_stored(labeled, int(p), names)]) for p in positions]
    try:
        for name in policy.views:
            fixed = name in ("test", "pseudo")
            for draw in range(1 if fixed else int(cfg.view.draws)):
                keys = image_keys(int(cfg.seed), draw, np.arange(len(positions)))
                view = feed.render(labeled, name, positions, keys)  # type: ignore[attr-defined]
                for number, (_, panels) in enumerate(rows):
                    target = view.targets[number]
                    lost = int(np.diff(labeled.offsets)[positions[number]]) - len(target)
                    panel = _panel(_WORDS.get(name, name), view, number, detector.normalize, target, names)
                    panel.notes += [f"{lost} of its boxes left out"] if lost else []
                    panels.append(panel)
    finally:
        feed.close()
    about = [
        f"data {opened.name}, policy {policy.name}, seed {cfg.seed}; detector {cfg.detector.name}",
        "Boxes went through the same matrix as the pixels. Small views are enlarged.",
    ]
    return Page(f"views of {policy.name}", about, rows)


def pseudo_labels(run_dir: Path, cfg: DictConfig, world: World) -> Page:
    """Unlabelled pictures with what a run's teacher finds, what of it is taught, and what is there.

    Args:
        run_dir: the run's folder; its newest checkpoint is used, its data is opened.
        cfg: this command's configuration.
        world: this process.

    Raises:
        UserError: there is no run, or its method labels nothing while it trains.
    """
    if why := files.trouble(run_dir / "config.yaml"):
        raise UserError(f"there is no run in {run_dir} (config.yaml: {why}): set run_dir to the folder of a run")
    own = saved.read_config(run_dir)
    own.cache_dir, own.pipeline.on_bad_image = cfg.cache_dir, "skip"
    own.devices = 1  # wherever it was trained, one process looks
    file = checkpoint.find(run_dir)
    state = checkpoint.read(file)
    trained.refuse_other_run(run_dir, file, state["identity"], own)
    settings = settings_of(own)
    data = build.data(settings)
    run = build.experiment(settings, world, data)
    try:
        run.method.load_state_dict(state["method"])
    except RuntimeError as error:
        raise UserError(checkpoint.misfit(file, error)) from error
    method = run.method
    if method.teacher is None or "weak" not in method.views.unlabeled:
        raise UserError(
            f"method={own.method.name} has no teacher that labels while it trains: view run_dir=DIR shows runs of "
            "methods that have one, view data=NAME augment=NAME shows what any method sees"
        )
    step = max(int(state["step"]) - 1, method.unlabeled_from)
    names = list(data.dataset.train.category_names)
    paths = {int(i): path for i, path in zip(data.unlabeled.ids, data.unlabeled.paths, strict=True)}  # type: ignore[union-attr]
    try:
        each = _labelled(run.pipeline.batches(step), method, step)
        shown = islice(each, int(cfg.view.images))
        rows = [(Path(paths[one.image]).name, _panels(one, method, data.hidden, names)) for one in shown]
    finally:
        run.pipeline.close()
    thresholds = {k: v for k, v in own.method.items() if isinstance(v, float) and k.endswith(("score", "uncertainty"))}
    about = [
        f"{run_names.cell_name(own)}, step {state['step']:,}, teacher; unlabelled pictures of data {data.dataset.name}",
        "thresholds: " + ", ".join(f"method.{key}={value:g}" for key, value in thresholds.items()),
        "Coloured boxes are taught, by class; grey ones the teacher found and the method does not use.",
    ]
    return Page("pseudo labels beside the hidden truth", about, rows)


def _labelled(batches: Iterator[Batch], method: Method, step: int) -> Iterator[Labelled]:
    """The unlabelled pictures of a training's batches, as the method labels them."""
    for batch in batches:
        yield from label_batch(method, batch, step)


def _panels(one: Labelled, method: Method, hidden: ImageSource | None, names: Sequence[str]) -> list[ViewPanel]:
    normalize = method.student.normalize
    kept, rejected = sort_out(one)
    panels = [_panel("weak: what the teacher finds", one.weak, 0, normalize, one.found, names)]
    everything = Target(
        *(torch.cat(parts) for parts in zip(*map(parts_of, (rejected.target, kept.target)), strict=True))
    )
    colors = [_REJECTED] * len(rejected.target) + [annotate.color_of(int(label)) for label in kept.target.labels]
    taught = _panel("strong: what is taught", one.strong, 0, normalize, everything, names, colors)
    taught.notes = _counted(kept.words, "kept for") + _counted(rejected.words, "not used:")
    panels.append(taught)
    if hidden is not None and one.image in hidden.ids:
        row = int(np.flatnonzero(hidden.ids == one.image)[0])
        truth = box_ops.targets_in_view([hidden.target(row)], one.strong)[0]
        panels.append(_panel("hidden truth", one.strong, 0, normalize, truth, names))
    else:
        panels.append(_panel("hidden truth: unknown", one.strong, 0, normalize, None, names))
    return panels


def _counted(words: Sequence[str], before: str) -> list[str]:
    return [f"{words.count(word)} {before} {word}" for word in dict.fromkeys(words)]


def _stored(source: ImageSource, position: int, names: Sequence[str]) -> ViewPanel:
    """A picture with its boxes as they are annotated."""
    with Image.open(source.paths[position]) as stored:
        image = stored.convert("RGB")
    rows = source.rows(position)
    target = Target(*(torch.from_numpy(part[rows]) for part in (source.boxes, source.labels, source.scores)))
    return ViewPanel(f"stored, {image.width}x{image.height}", _drawn(image, target, names))


def _panel(
    title: str,
    view: View,
    row: int,
    normalize: Normalize,
    target: Target | None,
    names: Sequence[str],
    colors: Sequence[Color] | None = None,
) -> ViewPanel:
    """A view's picture with boxes in its pixels."""
    height, width = view.sizes[row].tolist()
    pixels = view.images[row, :, :height, :width].float().cpu()
    pixels = pixels.flip(0) if normalize.bgr else pixels
    mean, std = (torch.tensor(part)[:, None, None] for part in (normalize.mean, normalize.std))
    values = (pixels * std + mean).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return ViewPanel(f"{title}, {width}x{height}", _drawn(Image.fromarray(values), target, names, colors))


def _drawn(
    image: Image.Image, target: Target | None, names: Sequence[str], colors: Sequence[Color] | None = None
) -> Image.Image:
    """A picture at a size that can be looked at, with boxes and captions; the scores of human labels are not shown."""
    scale = _scale(image)
    size = (round(image.width * scale), round(image.height * scale))
    large = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    if target is not None:
        order = np.argsort(target.scores.numpy(), kind="stable") if colors is None else np.arange(len(target))
        labels = target.labels.numpy()[order].tolist()
        scores = target.scores.numpy()[order].tolist()
        captions = [
            f"{plain(names[label - 1])}{'' if score >= 1 else f' {score:.2f}'}"
            for label, score in zip(labels, scores, strict=True)
        ]
        annotate.draw_detections(large, target.boxes.numpy()[order] * scale, labels, captions, colors)
    return large


def _scale(image: Image.Image) -> float:
    """Small views are enlarged by a whole factor, large ones made to fit."""
    longest = max(image.size)
    if longest > _LARGEST_PANEL:
        return _LARGEST_PANEL / longest
    return max(1.0, min(np.ceil(_SMALLEST_PANEL / min(image.size)), _LARGEST_PANEL // longest))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --dim: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --dim: #a0a0a0; --line: #3a3a3a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1500px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .1rem 0; color: var(--dim); } section { border-top: 1px solid var(--line); }
.row { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; } img { display: block; width: 100%; height: auto; }
figcaption { font-size: .8rem; color: var(--dim); } figcaption b { color: var(--ink); font-weight: 600; }
"""


def as_html(page: Page) -> str:
    """The page as one file with everything in it."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(plain(page.title))}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(plain(page.title))}</h1>",
        *(f"<p>{html.escape(plain(line))}</p>" for line in page.about),
    ]
    for name, panels in page.rows:
        parts.append(f"<section><h2>{html.escape(plain(name))}</h2><div class=row>")
        parts += [_figure(panel) for panel in panels]
        parts.append("</div></section>")
    return "\n".join([*parts, "</body></html>\n"])


def _figure(panel: ViewPanel) -> str:
    buffer = io.BytesIO()
    panel.image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    title = html.escape(plain(panel.title))
    notes = "".join(f"<br>{html.escape(plain(note))}" for note in panel.notes)
    return (
        f'<figure><img alt="{title}" width="{panel.image.width}" height="{panel.image.height}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption><b>{title}</b>{notes}</figcaption></figure>'
    )


def as_image(page: Page) -> Image.Image:
    """The same as one picture."""
    gap, line = 12, 18
    font, bold = annotate.typeface(13), annotate.typeface(15)
    widths = [max(r[1][c].image.width for r in page.rows if c < len(r[1])) for c in range(_columns(page))]
    heights = [
        max(p.image.height for p in panels) + line * (2 + max(len(p.notes) for p in panels)) for _, panels in page.rows
    ]
    top = line * (len(page.about) + 2)
    size = (sum(widths) + gap * (len(widths) + 1), top + sum(heights) + (gap + line) * len(heights))
    sheet = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 6), plain(page.title), (0, 0, 0), bold)
    for number, text in enumerate(page.about):
        pen.text((gap, 6 + line * (number + 1.3)), plain(text), (90, 90, 90), font)
    y = top
    for (name, panels), height in zip(page.rows, heights, strict=True):
        pen.text((gap, y), plain(name), (0, 0, 0), font)
        x = gap
        for panel, width in zip(panels, widths, strict=False):
            sheet.paste(panel.image, (x, y + line))
            for number, text in enumerate([panel.title, *panel.notes]):
                ink = (0, 0, 0) if number == 0 else (90, 90, 90)
                pen.text((x, y + line + panel.image.height + 2 + line * number), plain(text), ink, font)
            x += width + gap
        y += height + gap + line
    return sheet


def _columns(page: Page) -> int:
    return max(len(panels) for _, panels in page.rows)


def write(page: Page, out: Path) -> list[Path]:
    """Writes `view.html` and `view.png` into a folder; gives their paths."""
    buffer = io.BytesIO()
    as_image(page).save(buffer, "PNG")
    written: dict[str, Any] = {"view.html": as_html(page).encode(), "view.png": buffer.getvalue()}
    for name, content in written.items():
        files.write_atomically(out / name, content, durable=False)
    return [out / name for name in written]
