"""The study of semi-supervision on photographs: docs/photographs.md says what is asked and how, `study.py` how it runs.

    python benchmarks/photographs.py STAGE... --data DIR --runs DIR [--workers 2]
    python benchmarks/photographs.py STAGE... --table
    python benchmarks/photographs.py STAGE... --together FILE    # for `ssodbench report`

The stages are in the order in which they were run; a later one uses what an earlier one chose.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from study import STAGE_1, Stage, Study, main

DATA = ("raccoon", "bccd")
PRESET = "preset=photos"
TUNE = ("split.percent=6.67", "split.tune=0.25", "evaluation.set=tune")  # 7 of raccoon's 105 images that remain
FAST = ("precision=bf16", "batch.group_by_aspect=joint")  # of all stages but `curve`, which came before
STEPS = 400  # chosen by the stage `curve`
STRONG_LABELED = (
    "augment.views.labeled.color=${augment.views.strong.color}",
    "+augment.views.labeled.erase=${augment.views.strong.erase}",
)
STRONG_WEAK = (
    "+augment.views.weak.color=${augment.views.strong.color}",
    "+augment.views.weak.erase=${augment.views.strong.erase}",
)
OTHER_PICTURES = "data.unlabeled_images="

SUPERVISED = ("method=supervised",)


def stac(*, threshold: float = 0.9, lambda_u: float = 2) -> tuple[str, ...]:
    """The overrides of a setting of STAC."""
    return ("method=stac", STAGE_1, f"method.offline.threshold={threshold}", f"method.lambda_u={lambda_u}")


def mean_teacher(
    *, lambda_u: float = 2, score: float = 0.7, ema: float = 0.99, burn_in: float = 0.5
) -> tuple[str, ...]:
    """The overrides of a setting of Mean Teacher."""
    return (
        *("method=mean_teacher", f"method.burn_in={burn_in}", f"method.lambda_u={lambda_u}"),
        *(f"method.score={score}", f"method.ema.momentum={ema}"),
    )


def soft_teacher(
    *, lambda_u: float = 2, score: float = 0.7, uncertainty: float = 0.03, ema: float = 0.99
) -> tuple[str, ...]:
    """The overrides of a setting of Soft Teacher."""
    return (
        *("method=soft_teacher", "method.burn_in=0.5", f"method.lambda_u={lambda_u}", f"method.ema.momentum={ema}"),
        *(f"method.class_score={score}", f"method.rpn_score={score}", f"method.box_uncertainty={uncertainty}"),
    )


def no_box_terms(*, lambda_u: float = 1, score: float = 0.7, ema: float = 0.99) -> tuple[str, ...]:
    """Mean Teacher whose pseudo labels teach classes alone, which is Unbiased Teacher with values of Mean Teacher."""
    return (
        *("method=unbiased_teacher", "method.burn_in=0.5", f"method.lambda_u={lambda_u}", f"method.score={score}"),
        *(f"method.ema.momentum={ema}", "method.focal_gamma=0", "method.teacher_training_proposals=false"),
    )


TRIED = {
    "stac": stac(),
    "stac lambda 1": stac(lambda_u=1),
    "stac threshold 0.7": stac(threshold=0.7),
    "stac threshold 0.7 lambda 1": stac(threshold=0.7, lambda_u=1),
    "mean_teacher": mean_teacher(),
    "mean_teacher lambda 1": mean_teacher(lambda_u=1),
    "mean_teacher score 0.9": mean_teacher(score=0.9),
    "mean_teacher ema 0.998": mean_teacher(ema=0.998),
    "soft_teacher": soft_teacher(),
    "soft_teacher lambda 1": soft_teacher(lambda_u=1),
    "soft_teacher score 0.9": soft_teacher(score=0.9, uncertainty=0.02),
    "soft_teacher ema 0.998": soft_teacher(ema=0.998),
}
FINALISTS = ("stac threshold 0.7", "mean_teacher lambda 1", "soft_teacher score 0.9")  # of each method, after `tuning`
BEST = "mean_teacher lambda 1"  # after the stage `final`, before any run on an evaluation set
STAC = "stac threshold 0.7"
best = partial(mean_teacher, lambda_u=1)
TESTED = {"supervised": SUPERVISED, BEST: TRIED[BEST]}


def at(percents: dict[int, dict[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """`PERCENT %, NAME` -> overrides, out of the settings of each percentage."""
    return {
        f"{percent} %, {name}": (f"split.percent={percent}", *own)
        for percent, settings in percents.items()
        for name, own in settings.items()
    }


RATIOS = at({2: TESTED, 10: TESTED, 25: TESTED})
TUNED = (PRESET, *TUNE, *FAST, f"schedule.steps={STEPS}")
REPORTED = (PRESET, *FAST)
STAGES = (
    Stage(
        "curve",
        {f"{steps} steps": (*SUPERVISED, f"schedule.steps={steps}") for steps in (200, 400, 800)},
        (PRESET, *TUNE, "batch.group_by_aspect=null"),
        data=DATA,
    ),
    Stage(
        "recipe",
        {
            "preset": SUPERVISED,
            "lr 0.0005": (*SUPERVISED, "schedule.optimizer.lr=0.0005"),
            "backbone lr 0.1": (*SUPERVISED, "detector.backbone_lr_scale=0.1"),
            "strong labelled": (*SUPERVISED, *STRONG_LABELED),
        },
        TUNED,
        data=DATA,
    ),
    Stage("tuning", {"supervised": SUPERVISED, **TRIED}, TUNED, folds=(1,), data=DATA),
    Stage(
        "final",
        {"supervised": SUPERVISED, **{name: TRIED[name] for name in FINALISTS}},
        TUNED,
        folds=(2,),
        data=DATA,
    ),
    Stage(
        "test",
        TESTED,
        (*REPORTED, "split.percent=5", f"schedule.steps={STEPS}"),
        folds=(1, 2, 3, 4, 5),
        data=DATA,
    ),
    Stage(
        "twice",
        {f"{steps} steps": (*SUPERVISED, f"schedule.steps={steps}") for steps in (STEPS, 2 * STEPS)},
        (*REPORTED, "split.percent=5"),
        folds=(1, 2, 3),
        data=DATA,
    ),
    Stage(
        "ratios",
        RATIOS,
        (*REPORTED, f"schedule.steps={STEPS}"),
        folds=(1, 2, 3),
        data=DATA,
        baselines={name: f"{name.split(',')[0]}, supervised" for name in RATIOS},
    ),
    Stage(
        "few",
        at({2: {"supervised": SUPERVISED, STAC: TRIED[STAC]}}),
        (*REPORTED, f"schedule.steps={STEPS}"),
        folds=(1, 2, 3),
        data=DATA,
    ),
    Stage(
        "parts",
        {
            BEST: best(),
            "no burn-in": best(burn_in=0),
            "no threshold": best(score=0.05),
            "no average": best(ema=0),
            "no strong view": (*best(), "augment.views.strong.color=null", "augment.views.strong.erase=null"),
            "no box terms": no_box_terms(),
            "strong weak view": (*best(), *STRONG_WEAK),
            "strong labelled": (*best(), *STRONG_LABELED),
        },
        (*REPORTED, "split.percent=5", f"schedule.steps={STEPS}"),
        folds=(1, 2),
        data=DATA,
    ),
    Stage(
        "all",
        {"supervised": SUPERVISED, f"{BEST}, with pictures of coco_tiny": TRIED[BEST]},
        (*REPORTED, "split.protocol=full", OTHER_PICTURES, f"schedule.steps={STEPS}"),
        folds=(1,),
        data=DATA,
    ),
)

STUDY = Study(
    STAGES,
    Path(__file__).parent.parent / "results" / "reference" / "photographs-2cores",
    {**{f"data.root={name}": name for name in DATA}, OTHER_PICTURES: "coco_tiny/train2017"},
)

if __name__ == "__main__":
    main(STUDY, __doc__)
