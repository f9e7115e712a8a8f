"""The study of semi-supervision on photographs: docs/photographs.md says what is asked and how, `study.py` how it runs.

python benchmarks/photographs.py STAGE... --data DIR --runs DIR [--workers 2]
python benchmarks/photographs.py STAGE... --table
"""

from __future__ import annotations

from pathlib import Path

from study import STAGE_1, Stage, Study, main

DATA = ("raccoon", "bccd")
PRESET = "preset=photos"
# 7 of raccoon's 105 images that remain
TUNE = ("split.percent=6.67", "split.tune=0.25", "evaluation.set=tune")
FAST = ("precision=bf16", "batch.group_by_aspect=joint")  # of all stages but `curve`, which came before
STEPS = 400  # chosen by the stage `curve`
RECIPE: tuple[str, ...] = ()  # chosen by the stage `recipe`, for every method alike
STRONG_LABELED = (
    "augment.views.labeled.color=${augment.views.strong.color}",
    "+augment.views.labeled.erase=${augment.views.strong.erase}",
)
LATE = ("method.burn_in=0.5",)


def method(name: str, *more: str) -> tuple[str, ...]:
    """The overrides of a method and its settings."""
    return (f"method={name}", *more)


SUPERVISED = method("supervised")
TRIED = {
    "stac": method("stac", STAGE_1),
    "stac lambda 1": method("stac", STAGE_1, "method.lambda_u=1"),
    "stac threshold 0.7": method("stac", STAGE_1, "method.offline.threshold=0.7"),
    "stac threshold 0.7 lambda 1": method("stac", STAGE_1, "method.offline.threshold=0.7", "method.lambda_u=1"),
    "mean_teacher": method("mean_teacher", *LATE),
    "mean_teacher lambda 1": method("mean_teacher", *LATE, "method.lambda_u=1"),
    "mean_teacher score 0.9": method("mean_teacher", *LATE, "method.score=0.9"),
    "mean_teacher ema 0.998": method("mean_teacher", *LATE, "method.ema.momentum=0.998"),
    "soft_teacher": method("soft_teacher", *LATE),
    "soft_teacher lambda 1": method("soft_teacher", *LATE, "method.lambda_u=1"),
    "soft_teacher score 0.9": method(
        "soft_teacher", *LATE, "method.class_score=0.9", "method.rpn_score=0.9", "method.box_uncertainty=0.02"
    ),
    "soft_teacher ema 0.998": method("soft_teacher", *LATE, "method.ema.momentum=0.998"),
}
FINALISTS = ("stac threshold 0.7", "mean_teacher lambda 1", "soft_teacher score 0.9")  # of each method, after `tuning`
BEST = TRIED["mean_teacher lambda 1"]  # after the stage `final`, before any run on an evaluation set
KINDS = ("supervised", "best")
REPORTED = (PRESET, *FAST, *RECIPE)
STAGES = {
    "curve": Stage(
        {f"{steps} steps": method("supervised", f"schedule.steps={steps}") for steps in (200, 400, 800)},
        (PRESET, *TUNE),
        data=DATA,
    ),
    "recipe": Stage(
        {
            "preset": SUPERVISED,
            "lr 0.0005": method("supervised", "schedule.optimizer.lr=0.0005"),
            "backbone lr 0.1": method("supervised", "detector.backbone_lr_scale=0.1"),
            "strong labelled": method("supervised", *STRONG_LABELED),
        },
        (PRESET, *TUNE, *FAST, f"schedule.steps={STEPS}"),
        data=DATA,
    ),
    "tuning": Stage(
        {
            "supervised": SUPERVISED,
            **TRIED,
        },
        (PRESET, *TUNE, *FAST, f"schedule.steps={STEPS}", *RECIPE),
        folds=(1,),
        data=DATA,
    ),
    "final": Stage(
        {"supervised": SUPERVISED, **{name: TRIED[name] for name in FINALISTS}},
        (PRESET, *TUNE, *FAST, f"schedule.steps={STEPS}", *RECIPE),
        folds=(2,),
        data=DATA,
    ),
    "test": Stage(
        {"supervised": SUPERVISED, "best": BEST},
        (*REPORTED, "split.percent=5", f"schedule.steps={STEPS}"),
        folds=(1, 2, 3, 4, 5),
        data=DATA,
    ),
    "twice": Stage(
        {"supervised": SUPERVISED},
        (*REPORTED, "split.percent=5", f"schedule.steps={2 * STEPS}"),
        folds=(1, 2, 3),
        data=DATA,
    ),
    "ratios": Stage(
        {
            f"{percent} %, {name}": (f"split.percent={percent}", *setting)
            for percent in (2, 10, 25)
            for name, setting in (("supervised", SUPERVISED), ("best", BEST))
        },
        (*REPORTED, f"schedule.steps={STEPS}"),
        folds=(1, 2, 3),
        data=DATA,
        baselines={f"{percent} %, {name}": f"{percent} %, supervised" for percent in (2, 10, 25) for name in KINDS},
    ),
    "all": Stage(
        {"supervised": SUPERVISED, "best, with pictures of coco_tiny": (*BEST, "data.unlabeled_images=")},
        (*REPORTED, "split.protocol=full", f"schedule.steps={STEPS}"),
        folds=(1,),
        data=DATA,
    ),
}

STUDY = Study(
    STAGES,
    Path(__file__).parent.parent / "results" / "reference" / "photographs-2cores",
    {**{f"data.root={name}": name for name in DATA}, "data.unlabeled_images=": "coco_tiny/train2017"},
)

if __name__ == "__main__":
    main(STUDY, __doc__)
