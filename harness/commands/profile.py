"""`ssodbench profile`: where the time of a training step goes, settings side by side, or pipelines side by side."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.config.extras import check_extras
from harness.core.types import UserError


def run(cfg: DictConfig) -> int:
    """Measures, prints a table, and writes `out` if given; gives the exit code.

    Raises:
        UserError: a mistake in what was given, or too little memory.
    """
    options = cfg.profile
    if options.pipelines and options.sweep:
        raise UserError("profile.pipelines and profile.sweep measure different things: give one of them")
    if options.pipelines:
        check_extras(cfg, pipelines=[*options.pipelines, "dali"])  # whose decoder gives the ceiling
        from harness.engine import profile

        profile.run(cfg)
        return 0
    return _step(cfg)


def _step(cfg: DictConfig) -> int:
    """Measures in this process, or in one for each device."""
    check_extras(cfg)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # what makes traces is silent, also about GPUs that are not there
    from harness.core import distributed
    from harness.core.files import require_writable
    from harness.core.stopping import stop_signals
    from harness.engine.sweep import combinations
    from harness.launch.local import launch

    if cfg.profile.sweep:
        combinations(OmegaConf.to_container(cfg.profile.sweep, resolve=True))  # type: ignore[arg-type]
        if cfg.profile.trace:
            raise UserError("profile.trace shows one setting: leave profile.sweep or profile.trace out")
    for key in ("out", "profile.trace"):
        if place := OmegaConf.select(cfg, key):
            require_writable(Path(place), key)
    device = distributed.resolve_device(cfg.device, cfg.devices)
    plain = OmegaConf.to_container(cfg, resolve=False)
    if cfg.devices > 1 and "LOCAL_RANK" not in os.environ:
        return launch(_work, (plain, device), cfg.devices, [*stop_signals(), signal.SIGQUIT])
    return _rank(plain, device)


def _work(plain: Any, device: str) -> int:
    """`_rank` in a worker of the elastic launcher, which takes only the end of a process for a failure."""
    from harness.core.console import STDERR, settle

    try:
        code = _rank(plain, device)
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            STDERR.say(f"ssodbench: {error}")
        code = 2
    settle()
    if code:
        sys.exit(code)
    return code


def _rank(plain: Any, device: str) -> int:
    """Measures in one process of the group."""
    import torch

    from harness.core import distributed
    from harness.core.stopping import Interrupted, StopRequest

    cfg = OmegaConf.create(plain)
    assert isinstance(cfg, DictConfig)
    world = distributed.join(device)
    torch.set_num_threads(int(cfg.threads))
    stop = StopRequest()
    try:
        with stop.installed():
            found = _sweep(cfg, world, stop) if cfg.profile.sweep else _measured(cfg, world, stop)
    except Interrupted as stopped:
        return 128 + stopped.signal_number
    except Exception as error:
        if _is_out_of_memory(error):
            raise UserError(
                f"the profile does not fit in the memory of {world.device}: lower batch.micro, or set precision=bf16"
            ) from error
        raise
    finally:
        distributed.leave()
    if world.is_main:
        _tell(cfg, found)
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    """A GPU's error has a class of its own; what torch raises on a CPU is a RuntimeError."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _measured(cfg: DictConfig, world: Any, stop: Any) -> dict[str, Any]:
    from harness.config.run import settings_of
    from harness.engine.step_profile import profile_step

    options = cfg.profile
    trace = Path(options.trace) if options.trace else None
    return profile_step(settings_of(cfg), world, stop, float(options.seconds), int(options.rounds), trace)


def _sweep(cfg: DictConfig, world: Any, stop: Any) -> dict[str, Any]:
    from harness.config import compose
    from harness.config.run import settings_of
    from harness.core.console import STDERR
    from harness.engine.sweep import combinations, sweep, text_of

    given, folders = list(cfg.cli.overrides), list(cfg.cli.config_dirs)
    variants = []
    for chosen in combinations(OmegaConf.to_container(cfg.profile.sweep, resolve=True)):  # type: ignore[arg-type]
        own = [f"{key}={text_of(value)}" for key, value in chosen.items()]
        variants.append((chosen, settings_of(compose.load([*given, *own], folders))))

    def say(text: str) -> None:
        if world.is_main:
            STDERR.say(text)

    return sweep(variants, world, stop, float(cfg.profile.seconds), int(cfg.profile.rounds), say)


def _tell(cfg: DictConfig, found: dict[str, Any]) -> None:
    from harness.core.console import Console
    from harness.core.files import write_atomically
    from harness.report import stage_bars

    console = Console()
    for shown in stage_bars.tables(found):
        console.print(shown)
    for line in stage_bars.sentences(found):
        console.say(line)
    if cfg.out:
        out = Path(cfg.out)
        write_atomically(out, json.dumps(found, indent=1).encode() + b"\n")
        write_atomically(out.with_suffix(".svg"), stage_bars.svg(stage_bars.bars_of(found)).encode())
        console.say(f"written to {out} and {out.with_suffix('.svg')}")
    if cfg.profile.trace:
        console.say(f"the trace is in {cfg.profile.trace}: open it at https://ui.perfetto.dev")
