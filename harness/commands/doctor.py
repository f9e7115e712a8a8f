"""`ssodbench doctor`: whether a training could work on this machine, and what to do where not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from omegaconf import DictConfig
from rich.table import Table

from harness.commands import usage
from harness.core.console import Console
from harness.core.escape import literal
from harness.core.files import require_writable, write_atomically
from harness.core.record import environment
from harness.core.types import RunError

if TYPE_CHECKING:
    from harness.engine.doctor import Outcome

_WORDS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "fails": ("FAILS", "red")}


def run(cfg: DictConfig) -> int:
    """Tries what a training needs and prints what works and what does not; gives 1 where training could not work.

    Raises:
        UserError: a key is given that cannot be used, or `out` cannot be written.
        RunError: the packages that training stands on cannot even be imported.
    """
    try:
        from harness.engine import doctor
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing
        raise RunError(
            f"training cannot work here, a package cannot be imported ({error}): install ssodbench anew, with torch "
            "and torchvision of the same release"
        ) from error
    given = usage.refuse_unused(cfg, "doctor")
    out = Path(cfg.out) if cfg.out else None
    if out is not None:
        require_writable(out, "out")
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("what", "state", "found"):
        table.add_column(column, overflow="fold")
    findings = list(doctor.examine(cfg, Path(cfg.run_dir) if "run_dir" in given else None))
    for found in findings:
        word, color = _WORDS[found.state]
        said = f"{found.said}\n-> {found.remedy}" if found.remedy else found.said
        table.add_row(found.what, f"[{color}]{word}[/]", _literal_lines(said, console.encoding))
    console.print(table)
    failing = [found.what for found in findings if found.state == "fails"]
    console.say("training can work here" if not failing else f"training cannot work here: {', '.join(failing)}")
    if out is not None:
        write_atomically(out, msgspec.json.format(msgspec.json.encode(_content(findings))))
        console.say(f"written to {out}, for a bug report: look through it first, it names folders")
    return 1 if failing else 0


def _literal_lines(text: str, encoding: str) -> Any:
    """Several lines as they are."""
    first, *more = [literal(line, encoding) for line in text.split("\n")]
    for line in more:
        first.append("\n").append_text(line)
    return first


def _content(findings: Sequence[Outcome]) -> dict[str, Any]:
    return {"findings": [dataclasses.asdict(found) for found in findings], "environment": environment()}
