"""The keys of each command and how it is called: for help, completion, and to refuse keys that would be ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.core.types import UserError
from harness.core.validate import near

if TYPE_CHECKING:  # help needs no configuration, and is quick without
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Command:
    """A module of `harness.commands`."""

    does: str  # in a few words
    example: str  # keys of its line in the general help
    takes: tuple[str, ...]  # keys and groups; a group or section stands for its keys; empty: everything
    examples: tuple[tuple[str, str], tuple[str, str]]  # what a line does, and the keys after the command's name
    positional: str = ""  # the key of a value that stands alone


_RUN = ("data", "method", "detector", "detector_style", "augment", "pipeline", "schedule", "preset", "split", "batch")
_TRAIN = (
    *_RUN, "launcher", "evaluation", "precision", "channels_last", "compile", "device", "devices", "threads", "seed",
    "checkpointing", "logging", "runs_dir", "run_dir", "cache_dir",
)  # fmt: skip
_NETWORK = ("run_dir", "model", "network", "device", "threads", "cache_dir")

COMMANDS = {
    "prepare": Command(
        "open, check and describe a dataset and its split",
        "data=coco data.root=DIR",
        ("data", "split", "check", "export_dir", "prepare", "cache_dir"),
        (
            ("look at a folder in COCO's format, and at its splits", "data=custom data.root=photos"),
            ("decode every picture, write the split as COCO files", "data=coco data.root=D check=full export_dir=S"),
        ),
    ),
    "train": Command(
        "train one method on one split and score it",
        "method=soft_teacher split.percent=5",
        _TRAIN,
        (
            ("a small run on generated pictures", "method=mean_teacher split.percent=5"),
            ("a paper's recipe on eight GPUs", "method=soft_teacher data=coco data.root=coco preset=paper devices=8"),
        ),
    ),
    "suite": Command(
        "methods x label ratios x folds, then the report",
        "suite=quick",
        ("suite", *_TRAIN),
        (
            ("what `make bench` runs", "suite=quick"),
            ("the same with three folds, elsewhere", "suite=quick suite.folds=[1,2,3] runs_dir=elsewhere"),
        ),
    ),
    "report": Command(
        "records to tables and plots",
        "runs_dir=runs out=DIR",
        ("runs_dir", "out"),
        (
            ("of all runs", "runs_dir=runs"),
            ("of one suite, into a folder", "runs_dir=runs/quick out=report"),
        ),
    ),
    "evaluate": Command(
        "score a run again",
        "run_dir=DIR evaluation.score_threshold=0.001",
        (),
        (
            ("at another score threshold", "run_dir=runs/train/CELL evaluation.score_threshold=0.001"),
            ("on another dataset with the same classes", "run_dir=runs/train/CELL data=custom data.root=photos"),
        ),
    ),
    "predict": Command(
        "a trained network on your pictures",
        "run_dir=DIR images='photos/*.jpg' out=DIR",
        (*_NETWORK, "images", "out", "predict", "pipeline", "evaluation.batch"),
        (
            ("a run's network on a folder of pictures", "run_dir=runs/train/CELL images=photos out=found"),
            ("an exported file, what it is sure of", "model=D.safetensors images='photos/*.jpg' predict.score=0.8"),
        ),
    ),
    "view": Command(
        "what a policy shows, or what a teacher teaches",
        "data=coco augment=stac, or run_dir=DIR",
        ("view", "run_dir", "data", "split", "augment", "method", "detector", "preset", "pipeline", "seed", "device",
         "threads", "cache_dir", "out"),
        (
            ("labelled, weak and strong views with their boxes", "data=shapes augment=soft_teacher out=views"),
            ("a run's pseudo labels beside the hidden truth", "run_dir=runs/train/CELL out=labels"),
        ),
    ),
    "export": Command(
        "one network of a run as a file",
        "run_dir=DIR out=FILE.safetensors",
        (*_NETWORK, "out", "format", "export"),
        (
            ("the reported network, with what rebuilds it", "run_dir=runs/train/CELL out=detector.safetensors"),
            ("the student as a graph for other programs", "run_dir=runs/train/CELL network=student out=student.onnx"),
        ),
    ),
    "profile": Command(
        "where a training step's time goes; settings or pipelines side by side",
        "method=METHOD",
        (
            *("profile", "method", "detector", "data", "augment", "pipeline", "split", "batch", "precision", "device"),
            *("devices", "threads", "cache_dir", "out"),
        ),
        (
            ("a step of Soft Teacher, stage by stage", "method=soft_teacher out=profile.json"),
            ("settings side by side", "method=stac 'profile.sweep={pipeline.threads: [1, 2], batch.micro: [8, 32]}'"),
        ),
    ),
    "init": Command(
        "write the YAML of a folder of your own",
        "DIR",
        ("init", "out", "cache_dir"),
        (
            ("a folder in the format of COCO, Pascal VOC or YOLO", "photos"),
            ("under a name and at a place of your own", "photos out=conf/data/tools.yaml"),
        ),
        positional="init.dir",
    ),
    "doctor": Command(
        "whether a training could work on this machine",
        "out=FILE.json",
        ("device", "pipeline", "launcher", "cache_dir", "runs_dir", "run_dir", "out"),
        (
            ("what works, what does not, and the remedy", ""),
            ("a network mount too, with a file for a bug report", "run_dir=/mount/runs/a out=doctor.json"),
        ),
    ),
    "config": Command(
        "print the configuration a command would use",
        "method=stac preset=paper",
        (),
        (
            ("of a method's paper", "method=stac preset=paper"),
            ("every key, with the pictures of a folder", "data=custom data.root=photos"),
        ),
    ),
}  # fmt: skip


def given_keys(cfg: DictConfig) -> list[str]:
    """The keys of the command line, as they were written there."""
    return [str(override).split("=", 1)[0].lstrip("+~") for override in cfg.cli.overrides]


def refuse_unused(cfg: DictConfig, command: str) -> set[str]:
    """Refuses keys that a command would ignore; gives those of the command line.

    Raises:
        UserError: naming the key and those that the command takes.
    """
    takes = COMMANDS[command].takes
    given = given_keys(cfg)
    for key in given:
        if not any(key == known or key.startswith((f"{known}.", f"{known}/", f"{known}@")) for known in takes):
            hint = near(key, takes)
            raise UserError(f"{command} does not use {key}{hint or ': leave it out'}; it takes {', '.join(takes)}")
    return set(given)


def require_network(command: str, given: set[str]) -> None:
    """Checks that a command is told which network it is about.

    Raises:
        UserError: it is told nothing, or two things.
    """
    if {"run_dir", "model"} <= given:
        raise UserError(f"{command} takes run_dir=DIR or model=FILE, not both: leave one out")
    if not given & {"run_dir", "model"}:
        raise UserError(
            f"{command} needs a network: say run_dir=DIR, the folder of a run, or model=FILE, an exported one"
        )
