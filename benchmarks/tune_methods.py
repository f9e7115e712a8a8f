"""At most four settings of every newer method on shapes, 5 % of fold 1, judged on the images for choosing:
docs/methods.md says what was chosen, `study.py` how it runs.

    python benchmarks/tune_methods.py STAGE... --runs DIR [--workers 2]
    python benchmarks/tune_methods.py STAGE... --table

A stage for each detector: supervised training first, then Mean Teacher and the methods that this detector is for.
"""

from __future__ import annotations

from pathlib import Path

from study import Stage, Study, main

COMMON = ("preset=small", "split.percent=5", "data.val_set=tune")


def detector(name: str, settings: dict[str, tuple[str, ...]]) -> Stage:
    """The settings of one detector, `METHOD[, words]` to overrides."""
    rows = {
        words: (f"method={words.partition(',')[0]}", f"detector={name}", *overrides)
        for words, overrides in {"supervised": (), **settings}.items()
    }
    return Stage(rows, COMMON, folds=(1,))


STAGES = {
    "faster_rcnn": detector(
        "small",
        {
            "mean_teacher": (),
            "mixpl": (),
            "mixpl, lambda 1": ("method.lambda_u=1",),
            "mixpl, score 0.5": ("method.score=0.5",),
            "mixpl, mosaics 0.25": ("method.mosaic_weight=0.25",),
        },
    ),
    "fcos": detector(
        "small_fcos_iou",
        {
            "mean_teacher, score 0.3": ("method.score=0.3",),
            "mean_teacher, score 0.4": ("method.score=0.4",),
            "mean_teacher, score 0.5": ("method.score=0.5",),
            "mean_teacher, classes": ("method.adaptive={share: 0.5, images: 512}",),
            "dense_teacher": (),
            "dense_teacher, class weight 1": ("method.class_weight=1",),
            "dense_teacher, share 0.04": ("method.share=0.04",),
            "dense_teacher, rise 0.3": ("method.rise=0.3",),
            "arsl": (),
            "arsl, lambda 0.5": ("method.lambda_u=0.5",),
            "arsl, class weight 1": ("method.class_weight=1",),
            "arsl, rise 0.3": ("method.rise=0.3",),
        },
    ),
    "retina": detector(
        "small_consistent_retina",
        {
            "mean_teacher, score 0.3": ("method.score=0.3",),
            "mean_teacher, score 0.4": ("method.score=0.4",),
            "mean_teacher, score 0.5": ("method.score=0.5",),
            "mean_teacher, classes": ("method.adaptive={share: 0.5, images: 512}",),
            "consistent_teacher": (),
            "consistent_teacher, lambda 1": ("method.lambda_u=1",),
            "consistent_teacher, rise 0.3": ("method.rise=0.3",),
            "consistent_teacher, queue 400": ("method.queue=400",),
        },
    ),
}
STUDY = Study(STAGES, Path(__file__).parent.parent / "results" / "reference" / "methods-2cores" / "tuning")

if __name__ == "__main__":
    main(STUDY, __doc__)
