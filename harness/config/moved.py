"""Names of constructors that have moved: configurations that were saved, or written, under the old ones still work."""

from __future__ import annotations

from typing import Any

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
    "pipelines.dali.DaliPipeline": "pipelines.dali.pipeline.DaliPipeline",
}
_FIRST = {new: old for old, new in MOVED.items()}


def current(config: Any) -> None:
    """Gives each group of a configuration the name under which its constructor is found today; in place."""
    _rename(config, MOVED)


def first(config: Any) -> None:
    """Gives each group the name that its constructor had first; in place."""
    _rename(config, _FIRST)


def _rename(config: Any, names: dict[str, str]) -> None:
    for group in ("data", "method", "pipeline"):
        options = config.get(group)
        target = options.get("_target_") if hasattr(options, "get") else None
        if isinstance(target, str) and target in names:
            options["_target_"] = names[target]
