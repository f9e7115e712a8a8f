"""`ssodbench export`: one network of a run as a file."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from harness.commands import usage
from harness.config.extras import need
from harness.core.console import Console, counted
from harness.core.files import require_writable, write_atomically
from harness.core.types import UserError


def run(cfg: DictConfig) -> int:
    """Writes the network that `run_dir` (or `model`) and `network` name to `out`; gives the exit code.

    Raises:
        UserError: a key is missing or cannot be used, or there is no such network.
    """
    given = usage.refuse_unused(cfg, "export")
    usage.require_network("export", given)
    if not cfg.out:
        raise UserError("export needs a file to write: say out=FILE.safetensors, .pt, .onnx or .pt2")
    out = Path(cfg.out)
    require_writable(out, "out")
    kind = _kind(cfg, out)
    if kind == "onnx":
        for module in ("onnx", "onnxscript"):
            need(module, f"format=onnx needs {module}, which", "format=pt2")
    from harness.engine import export, trained

    network = trained.open_trained(cfg)
    made = export.export(network, kind, cfg.export.size, float(cfg.export.score))
    write_atomically(out, made.content)
    console = Console()
    about = network.about
    parameters = sum(value.numel() for value in network.detector.parameters())
    console.say(
        f"{out}: the {about.network} of {about.cell} (step {about.step:,}), {parameters:,} parameters, "
        f"{counted(len(about.classes), 'class')}, {len(made.content) / 2**20:.1f} MiB"
    )
    if made.program is None:
        console.say(f"ssodbench predict model={out} images='photos/*.jpg' uses it")
    else:
        height, width = made.program.canvas
        console.say(
            f"inputs: image (3, {height}, {width}) float32 RGB 0..255, size (2,) int64; see docs/after_training.md"
        )
    return 0


def _kind(cfg: DictConfig, out: Path) -> str:
    """The kind of file, by `format` or else by the name's ending."""
    kinds = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", ".onnx": "onnx", ".pt2": "pt2"}
    by_name = kinds.get(out.suffix.lower())
    if cfg.format is None and by_name is None:
        raise UserError(f"out={out} does not say which kind of file: end it in {', '.join(kinds)}, or give format=KIND")
    return str(cfg.format or by_name)
