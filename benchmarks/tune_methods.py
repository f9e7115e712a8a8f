"""At most four settings of every newer method on shapes, 5 % of fold 1, judged on the images for choosing:
docs/methods.md says what was chosen, `study.py` how it runs.

    python benchmarks/tune_methods.py STAGE... --runs DIR [--workers 2]
    python benchmarks/tune_methods.py STAGE... --table

A stage for each detector: supervised training first, then Mean Teacher and the methods that this detector is for. The
stage `dense_teacher` came after them and chose nothing: it switches parts of Dense Teacher off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study import Stage, Study, main

COMMON = ("preset=small", "split.percent=5", "data.val_set=tune")
# What the small presets had before this was run; now they have what it chose.
BEFORE: dict[str, dict[str, Any]] = {
    "mixpl": {"lambda_u": 2},
    "dense_teacher": {"class_weight": 4},
    "arsl": {"rise": 0.1},
    "consistent_teacher": {"rise": "null"},
}
MEAN_TEACHER = {  # on a detector whose classes score lower than those of Faster R-CNN
    "mean_teacher, score 0.3": {"score": 0.3},
    "mean_teacher, score 0.4": {"score": 0.4},
    "mean_teacher, score 0.5": {"score": 0.5},
    "mean_teacher, classes": {"adaptive": "{share: 0.5, images: 512}"},
}
DENSE = {"class_weight": 1}
UNZOOMED = {"augment": "small_shared", "augment.views.weak.zoom": "null", "augment.views.strong.zoom": "null"}


def stage(name: str, detector: str, settings: dict[str, dict[str, Any]]) -> Stage:
    """The stage of one detector; settings are `METHOD[, words]` -> values, of the method's keys or of `augment`."""
    rows = {}
    for words, own in {"supervised": {}, **settings}.items():
        method = words.partition(",")[0]
        values = {**BEFORE.get(method, {}), **own}
        keys = (f"{'' if key.startswith('augment.') else 'method.'}{key}={value}" for key, value in values.items())
        rows[words] = (f"method={method}", f"detector={detector}", *keys)
    return Stage(name, rows, COMMON, folds=(1,))


STAGES = (
    stage(
        "faster_rcnn",
        "small",
        {
            "mean_teacher": {},
            "mixpl": {},
            "mixpl, lambda 1": {"lambda_u": 1},
            "mixpl, score 0.5": {"score": 0.5},
            "mixpl, mosaics 0.25": {"mosaic_weight": 0.25},
        },
    ),
    stage(
        "fcos",
        "small_fcos_iou",
        {
            **MEAN_TEACHER,
            "dense_teacher": {},
            "dense_teacher, class weight 1": {"class_weight": 1},
            "dense_teacher, share 0.04": {"share": 0.04},
            "dense_teacher, rise 0.3": {"rise": 0.3},
            "arsl": {},
            "arsl, lambda 0.5": {"lambda_u": 0.5},
            "arsl, class weight 1": {"class_weight": 1},
            "arsl, rise 0.3": {"rise": 0.3},
        },
    ),
    stage(
        "retina",
        "small_consistent_retina",
        {
            **MEAN_TEACHER,
            "consistent_teacher": {},
            "consistent_teacher, lambda 1": {"lambda_u": 1},
            "consistent_teacher, rise 0.3": {"rise": 0.3},
            "consistent_teacher, queue 400": {"queue": 400},
        },
    ),
    stage(
        "dense_teacher",
        "small_fcos_iou",
        {
            "dense_teacher": DENSE,
            "dense_teacher, nothing": {**DENSE, "lambda_u": 0},
            "dense_teacher, class alone": {**DENSE, "box_weight": 0, "quality_weight": 0},
            "dense_teacher, no class": {"class_weight": 0},
            "dense_teacher, no quality": {**DENSE, "quality_weight": 0},
            "mean_teacher": {"score": 0.5},
            "mean_teacher, its views": {"score": 0.5, "augment": "small_shared"},
            "mean_teacher, its views without zoom": {"score": 0.5, **UNZOOMED},
            "dense_teacher, without zoom": {**DENSE, **UNZOOMED},
            "dense_teacher, class alone, without zoom": {**DENSE, "box_weight": 0, "quality_weight": 0, **UNZOOMED},
            "arsl": {"rise": 0.3},
            "arsl, without zoom": {"rise": 0.3, **UNZOOMED},
        },
    ),
)
STUDY = Study(STAGES, Path(__file__).parent.parent / "results" / "reference" / "methods-2cores" / "tuning")

if __name__ == "__main__":
    main(STUDY, __doc__)
