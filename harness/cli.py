"""The command line: `ssodbench COMMAND key=value ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from harness.escape import never_refuse, plain
from harness.types import UserError

_HELP = """\
ssodbench COMMAND [--config-dir DIR] [key=value | group=option ...]

Which semi-supervised detector gives how much mAP, at which label ratio, for how much compute.

commands
  prepare    open, check and describe a dataset and its split   data=coco data.root=DIR
  train      train one method on one split and score it         method=soft_teacher split.percent=5
  suite      methods x label ratios x folds, then the report    suite=quick
  report     records to tables and plots                        runs_dir=runs out=DIR
  evaluate   score a run again                                  run_dir=DIR evaluation.score_threshold=0.001
  profile    throughput of the pipelines, alternating           profile.pipelines=[dali,torchvision]
  config     print the configuration a command would use        method=stac preset=paper

groups    data, method, detector, augment, pipeline, schedule, preset, suite
keys      split.percent split.fold split.protocol  batch.labeled batch.unlabeled  schedule.steps  seed
          devices device threads  runs_dir run_dir cache_dir  evaluation.every checkpointing.every  ...
          `ssodbench config` lists them all with their values.
exit code 0 ok, 1 failed, 2 a mistake in what was given, 130 and 143 interrupted (start again to continue)
"""


def _prepare(cfg: DictConfig) -> int:
    from harness import prepare

    prepare.run(cfg)
    return 0


def _train(cfg: DictConfig) -> int:
    from harness.jobs import end_with_suite
    from harness.launch import run

    end_with_suite()
    return run(cfg)


def _suite(cfg: DictConfig) -> int:
    from harness.suite import run

    return run(cfg)


def _report(cfg: DictConfig) -> int:
    from harness.report import run

    runs_dir = Path(cfg.runs_dir)
    print(run(runs_dir, Path(cfg.out) if cfg.out else runs_dir / "report"))
    return 0


def _evaluate(cfg: DictConfig) -> int:
    from harness.score import run

    return run(cfg)


def _profile(cfg: DictConfig) -> int:
    from harness.profile import run

    run(cfg)
    return 0


def _config(cfg: DictConfig) -> int:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(cfg, resolve=True), end="")
    return 0


_COMMANDS: dict[str, Callable[[DictConfig], int]] = {
    "prepare": _prepare,
    "train": _train,
    "suite": _suite,
    "report": _report,
    "evaluate": _evaluate,
    "profile": _profile,
    "config": _config,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; gives its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        never_refuse(stream)
    parser = argparse.ArgumentParser(prog="ssodbench", add_help=False)
    parser.add_argument("command", nargs="?")
    parser.add_argument("--config-dir", action="append", default=[])
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("overrides", nargs="*")
    known, unknown = parser.parse_known_intermixed_args(given)
    if known.help or not known.command:
        print(_HELP, end="")
        return 0 if known.help else 2
    try:
        if unknown:
            raise UserError(
                f"the option {unknown[0]} is not known: settings are given as key=value, see ssodbench --help"
            )
        if known.command not in _COMMANDS:
            raise UserError(f"the command {known.command} is not known: choose one of {', '.join(_COMMANDS)}")
        from harness.config import load

        return _COMMANDS[known.command](load(known.overrides, known.config_dir))
    except UserError as error:
        print(f"ssodbench: {plain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssodbench: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`ssodbench config | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
