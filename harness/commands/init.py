"""`ssodbench init DIR`: the YAML of a folder of pictures and annotations."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from omegaconf import DictConfig

from harness.commands import usage
from harness.config import compose, extras, targets
from harness.core.console import Console, counted
from harness.core.files import require_writable, write_atomically
from harness.core.types import UserError
from harness.data.datasets import CocoIndex
from harness.engine import own_data


def run(cfg: DictConfig) -> int:
    """Recognises the format of a folder, measures its boxes, and writes `conf/data/NAME.yaml`; gives the exit code.

    Raises:
        UserError: there is no folder, nothing in it that is known, or the YAML cannot be written or is there already.
    """
    usage.refuse_unused(cfg, "init")
    if not cfg.init.dir:
        raise UserError("say which folder: ssodbench init DIR")
    root = Path(cfg.init.dir)
    out = Path(cfg.out) if cfg.out else Path("conf") / "data" / f"{_name(root)}.yaml"
    if out.suffix != ".yaml" or out.parent.name != "data":
        raise UserError(f"out={out} cannot be found by data=NAME: give a path that ends in data/NAME.yaml")
    require_writable(out, "out")
    if out.exists():
        raise UserError(f"out={out} is there already: delete it, or give another name by out=DIR/data/NAME.yaml")
    found = own_data.recognize(root, out.stem, cfg.cache_dir)
    train, val = found.dataset.train, found.dataset.val
    small = own_data.measure(train)
    write_atomically(out, own_data.as_yaml(found, small).encode())
    compose.load([f"data={out.stem}"], [out.parent.parent])  # what was written can be read
    console = Console()
    names = ", ".join(map(str, train.category_names[:8])) + (", ..." if len(train.category_names) > 8 else "")
    console.say(
        f"{root} is in {found.form}'s format: {counted(len(train), 'picture')} to train on, with "
        f"{counted(int((~train.crowd).sum()), 'box')}, {f'{len(val):,}' if len(val) else 'none'} to evaluate, "
        f"{counted(len(train.category_names), 'class')} ({names})"
    )
    console.say(
        f"wrote {out}: for training on a CPU pictures of {small.short_side} px with anchors of "
        f"{', '.join(map(str, small.anchor_sizes))} px"
    )
    _say_next(train, len(val) > 0, out, console)
    return 0


def _say_next(train: CocoIndex, evaluates: bool, out: Path, console: Console) -> None:
    """The next commands. Where half of the pictures show nothing, they are those that nobody labelled."""
    console.say("now look at the data, then train:")
    given = f"--config-dir {shlex.quote(str(out.parent.parent))} data={shlex.quote(out.stem)}"
    most = int(train.boxed().sum()) >= len(train) / 2
    if evaluates:
        keys, method = "", f"method=mean_teacher {'split.percent=10' if most else 'split.protocol=annotated'}"
    else:
        keys = f" {'split.percent=100' if most else 'split.protocol=annotated'} split.holdout=0.2"
        method = f"method={'supervised' if most else 'mean_teacher'}"
    console.say(f"  ssodbench prepare {given}{keys}")
    console.say(f"  ssodbench train {given} {method}{keys} preset=photos")
    if evaluates and most:
        console.say("or compare methods at 1, 5 and 10 % of the labels:")
        console.say(f"  ssodbench suite {given} suite=quick suite.name={shlex.quote(out.stem)} preset=photos")
    if missing := extras.missing_for_photos():
        console.say(f"preset=photos, the CPU recipe for photographs, needs first: {missing}")
    if not evaluates:
        console.say("split.holdout takes a fifth of the labelled pictures to evaluate on")
    if keys and most:
        console.say("a folder of unlabelled pictures beside them: method=mean_teacher data.unlabeled_images=FOLDER")


def _name(root: Path) -> str:
    """The folder's name in characters that a command line takes; not that of a dataset which comes with the program."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", root.absolute().name).strip("-") or "own"
    shipped = {file.stem for file in (targets.CONF_DIR / "data").glob("*.yaml")}
    return f"{name}-own" if name in shipped else name
