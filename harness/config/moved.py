"""Names that have moved, of constructors and of options: configurations that were saved or written under the old ones
still work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.types import UserError

# The old `_target_` -> the new one. A run's identity goes by the old name, so that runs that were
# made under it keep theirs.
MOVED = {
    "harness.datasets.coco_dataset": "harness.data.datasets.coco_dataset",
    "harness.shapes.shapes_dataset": "harness.data.shapes.shapes_dataset",
    "harness.voc.voc_dataset": "harness.data.voc.voc_dataset",
    "detectors.mean_teacher.MeanTeacher": "detectors.methods.mean_teacher.MeanTeacher",
    "detectors.soft_teacher.SoftTeacher": "detectors.methods.soft_teacher.SoftTeacher",
    "detectors.stac.Stac": "detectors.methods.stac.Stac",
    "detectors.supervised.Supervised": "detectors.methods.supervised.Supervised",
    "detectors.unbiased_teacher.UnbiasedTeacher": "detectors.methods.unbiased_teacher.UnbiasedTeacher",
    "detectors.one_stage.fcos": "detectors.fcos.fcos",
    "detectors.one_stage.retinanet": "detectors.retinanet.retinanet",
    "pipelines.dali.DaliPipeline": "pipelines.dali.pipeline.DaliPipeline",
}
# Options that are no file any more: (group, old name) -> the option, and the keys that make it the old one.
OPTIONS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("detector", f"{family}_r{depth}"): (family, {"depth": depth, "name": f"{family}_r{depth}"})
    for family in ("faster_rcnn", "retinanet", "fcos")
    for depth in (18, 50, 101)
}
# What had a name alone before it had a `_target_`: the place in a configuration, and the constructor of each name.
NAMED = {
    "schedule.optimizer": {"sgd": "harness.engine.optim.sgd", "adamw": "harness.engine.optim.adamw"},
}
# Keys of launcher=slurm that have become others: the key, and how a value is written there.
_SLURM_KEYS = {
    "launcher.minutes": lambda minutes: f"launcher.time='0-{int(minutes) // 60}:{int(minutes) % 60:02d}:00'",
    "launcher.cpus_per_device": lambda cores: f"launcher.cpus={int(cores)}",
    "launcher.memory_gb": lambda size: f"launcher.memory={round(float(size) * 1024)}M",
}
_FIRST = {new: old for old, new in MOVED.items()}


def current(config: Any) -> None:
    """Gives each group of a configuration the name under which its constructor is found today; in place."""
    _rename(config, MOVED)
    for place, targets in NAMED.items():
        options = _at(config, place)
        if options is not None and options.get("name") in targets:
            target = targets[options.pop("name")]
            # A short name is said on top of a shipped constructor, never on top of one of the user's own.
            if options.get("_target_") in (None, *targets.values()):
                options["_target_"] = target


def first(config: Any) -> None:
    """Gives each group the name that its constructor had first; in place."""
    _rename(config, _FIRST)
    for place, targets in NAMED.items():
        options = _at(config, place)
        names = {target: name for name, target in targets.items()}
        if options is not None and options.get("_target_") in names:
            options["name"] = names[options.pop("_target_")]


def override(text: str) -> str:
    """An override `PLACE.name=VALUE`, or `PLACE={name: VALUE}`, of what has a `_target_` today, so that it is taken
    although the key `name` is not there.

    Raises:
        UserError: there is no such name, or a key is another one today.
    """
    key, _, value = text.lstrip("+").partition("=")
    if key in _SLURM_KEYS:
        try:
            raise UserError(f"{key} is another key today: say {_SLURM_KEYS[key](value)}")
        except ValueError as error:
            raise UserError(f"{key} is another key today: see harness/conf/launcher/slurm.yaml") from error
    if key == "launcher.parameters" or key.startswith("launcher.parameters."):
        return f"++{key}={value}"  # any option of sbatch is taken
    if key in NAMED and value.startswith("{"):
        return f"++{key}={value}"
    place, _, last = key.rpartition(".")
    if place not in NAMED or last != "name":
        return text
    if value not in NAMED[place]:
        raise UserError(
            f"{key}={value} must be one of {', '.join(NAMED[place])}: name another one by "
            f"{place}._target_=package.module.Name"
        )
    return f"++{key}={value}"


def _at(config: Any, place: str) -> Any:
    """The mapping at a dotted place; None if there is none."""
    for key in place.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None


def _rename(config: Any, names: dict[str, str]) -> None:
    for group in ("data", "detector", "method", "pipeline"):
        options = config.get(group)
        target = options.get("_target_") if hasattr(options, "get") else None
        if isinstance(target, str) and target in names:
            options["_target_"] = names[target]
