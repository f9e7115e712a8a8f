"""Mistakes in the user's own YAML files: what cannot be read, and keys and values that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.bad_input.case import Case


def _file(name: str, content: str | bytes, *names: str, more: str = "", others: dict[str, str] | None = None) -> Case:
    """A file of a config folder, chosen on the command line; the sentence names it."""
    group, stem = name.rsplit("/", 1)
    place = f"{{tmp}}/conf/{name}.yaml"
    return Case(
        f"{name}: {content[-40:]!r}",
        f"config --config-dir {{tmp}}/conf {group}={stem} {more}",
        (place, *names),
        prepare=_writer({f"{name}.yaml": content, **(others or {})}),
    )


def _writer(files: dict[str, str | bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in files.items():
            path = folder / "conf" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


_POLICY = "name: mine\nviews:\n  labeled: {}\n  test: {}\n"
_DATA = "defaults: [custom]\nname: mine\n"
_METHOD = "_target_: detectors.methods.supervised.Supervised\nname: mine\naugment: small\n"

CASES = [
    # what cannot be read
    _file("schedule/mine", "steps: [1,\nfoo: }", "line 2"),
    _file("schedule/mine", "defaults: [small]\n\tsteps: 3\n", "line 2", "tabs"),
    _file("schedule/mine", b"defaults: [small]\nsteps: 3 # \xff\xfe\n", "line 2", "UTF-8"),
    _file("schedule/mine", "steps: 3\n".encode("utf-16"), "UTF-8"),
    _file("schedule/mine", b"steps: \0 3\n"),
    _file("schedule/mine", "defaults: [small]\nsteps: 3\nsteps: 4\n", "line 3", "duplicate key steps"),
    _file("schedule/mine", "defaults: [small]\nsteps: !!python/object/apply:os.getcwd []\n", "line 2"),
    _file("schedule/mine", "defaults: [small]\nsteps: !other 3\n", "line 2"),
    _file("schedule/mine", "- 1\n- 2\n", "line 1", "a list"),
    _file("schedule/mine", "", "line 1", "nothing"),
    _file("schedule/mine", "# only a comment\n", "nothing"),
    _file("schedule/mine", "hello", "a single value"),
    _file("schedule/mine", "steps: 3\n---\nsteps: 4\n", "line 2"),
    _file("schedule/mine", "defaults: [small]\nsteps: *x\n", "line 2"),
    _file("schedule/mine", "defaults: [small]\n? [a, b]\n: 3\n", "line 2"),
    _file("schedule/mine", "defaults: [small]\nnull: 3\n", "line 2"),
    _file("schedule/mine", "defaults: [small]\n1: 3\n", "line 2", "quotes"),
    _file("schedule/mine", "defaults: small\n", "line 1", "a list"),
    _file("schedule/mine", "defaults: {a: b}\n", "line 1"),
    _file("schedule/mine", "steps: &x\n  b: *x\n"),
    _file("schedule/mine", "defaults: [mine]\nsteps: 3\n", "itself"),
    _file(
        "schedule/mine",
        "defaults: [other]\nsteps: 4\n",
        "itself",
        others={"schedule/other.yaml": "defaults: [mine]\n"},
    ),
    _file("data/mine", "name: [x\n", "line 2"),
    _file("suite/mine", "# @package _global_\ndefaults: [quick]\nsuite: {name: a\n", "line"),
    # keys that are not known
    _file("schedule/mine", "defaults: [small]\nlearning_rate: 3\n", "schedule.learning_rate", "line 2"),
    _file("schedule/mine", "defaults: [small]\nstep: 3\n", "did you mean steps", "line 2"),
    _file("schedule/mine", "defaults: [small]\noptimizer: {rate: 3}\n", "schedule.optimizer.rate", "line 2"),
    _file("data/mine", f"{_DATA}labelled: 3\n", "data.labelled", "line 3"),
    _file("data/mine", f"{_DATA}percent: 3\n", "data.percent", "line 3"),
    _file("data/mine", f"{_DATA}small: {{short: 64}}\n", "data.small.short", "line 3"),
    _file("preset/mine", "# @package _global_\nevaluaton: {every: 3}\n", "did you mean evaluation", "line 2"),
    _file("preset/mine", "# @package _global_\nevaluation: {evry: 3}\n", "did you mean every", "line 2"),
    _file("suite/mine", "# @package _global_\ndefaults: [quick]\nsuite: {percent: [1]}\n", "did you mean percents"),
    _file("suite/mine", "# @package _global_\ndefaults: [quick]\nsutie: {name: b}\n", "did you mean suite", "line 3"),
    _file("method/mine", f"{_METHOD}labelled_view: weak\n", "did you mean labeled_view", "line 4"),
    _file("method/mine", f"{_METHOD}ema: {{momentun: 0.9}}\n", "did you mean momentum", "line 4"),
    _file("detector/mine", "defaults: [small]\nanchors: [3]\n", "detector.anchors", "line 2"),
    _file("detector/mine", "defaults: [small]\nrpn: {bach: 3}\n", "did you mean batch", "line 2"),
    _file("pipeline/mine", "defaults: [torchvision]\nworkers: 3\n", "pipeline.workers", "line 2"),
    _file("augment/mine", f"{_POLICY}antialiasing: true\n", "did you mean antialias", "line 5"),
    _file("augment/mine", f"{_POLICY}  weak: {{fliip: 0.5}}\n", "did you mean flip", "line 5"),
    _file("launcher/mine", "defaults: [slurm]\nnode: 3\n", "did you mean nodes", "line 2"),
    # values that cannot be
    _file("schedule/mine", "defaults: [small]\nsteps: 2020-01-01\n", "schedule.steps", "line 2"),
    _file("schedule/mine", "defaults: [small]\nsteps: !!binary aGVsbG8=\n", "schedule.steps", "line 2"),
    _file("schedule/mine", "defaults: [small]\nsteps: ${nope}\n", "schedule.steps", "line 2"),
    _file("schedule/mine", "defaults: [small]\nsteps: .nan\n", "schedule.steps", "line 2"),
    _file("schedule/mine", "defaults: [small]\nsteps:\n", "schedule.steps=null", "line 2"),
    _file("preset/mine", "# @package _global_\nbatch: {labeled: many}\n", "batch.labeled=many", "line 2"),
    _file("suite/mine", "# @package _global_\ndefaults: [quick]\nsuite: {folds: [1.5]}\n", "suite.folds[0]=1.5"),
    _file("method/mine", f"{_METHOD}reported: nobody\n", "method.reported=nobody", "line 4"),
    _file("augment/mine", f"{_POLICY}color_at: moon\n", "augment.color_at=moon", "line 5"),
]


def _unplaced(name: str, content: str, *names: str) -> Case:
    """The sentence is about something that stands in no line."""
    group, stem = name.rsplit("/", 1)
    command = f"config --config-dir {{tmp}}/conf {group}={stem}"
    return Case(f"{name} lacks: {content[:50]!r}", command, names, prepare=_writer({f"{name}.yaml": content}))


CASES += [
    _unplaced("augment/mine", "views:\n  test: {}\n", "augment.name is missing"),
    _unplaced("augment/mine", "name: mine\n", "augment.views is missing"),
    _unplaced("augment/mine", "name: mine\nviews: {}\n", "at least one view"),
    _unplaced("augment/mine", "name: mine\nviews: {labeled: {}}\n", "no view 'test'"),
    _unplaced("schedule/mine", "steps: 3\n", "schedule.optimizer is missing"),
    _unplaced("schedule/mine", "defaults: [nope]\n", "schedule=nope"),
    _unplaced("schedule/mine", "defaults: [3]\n", "defaults"),
    _unplaced("method/mine", "name: mine\naugment: small\n", "method._target_"),
    _unplaced("method/mine", "_target_: detectors.methods.supervised.Supervised\naugment: small\n", "method.name"),
    _unplaced("method/mine", "_target_: nowhere.Method\nname: mine\naugment: small\n", "nowhere.Method"),
    _unplaced("data/mine", "name: mine\nroot: x\n", "data._target_"),
    _unplaced("data/mine", "_target_: harness.data.datasets.coco_dataset\nname: mine\n", "data.root is missing"),
    _unplaced("suite/mine", "# @package _global_\nsuite: {name: mine}\n", "suite.methods is missing"),
]
