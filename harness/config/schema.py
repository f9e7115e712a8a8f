"""The configuration's keys, as types: what each may be, within which bounds, and which are known at all.

What has a `_target_` (the groups `data`, `detector`, `method`, `pipeline` and `launcher`, the optimiser, the decay, the
loggers) is checked against the constructor that it names, and `augment` against `pipelines.policy`. What no machine can
mean is out of bounds, before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from harness.core.steps import SomeStepsOrPart
from harness.core.validate import File, Images, Limits, Name, Pixels, Positive, Seed, Share, Steps, Threads
from harness.splits.protocols import Fold, Percent, Shots, SplitOptions

LoggerName = Literal["tensorboard", "wandb", "mlflow"]
Decay = Literal["flat", "step", "linear", "cosine"]
Milestone = Annotated[
    float,
    Limits(
        gt=0,
        le=1e9,
        whole_from=1,
        words="a step, or below 1 a fraction of the schedule, above 0: [120000,160000], or []",
    ),
]

_TWO = "a list of two, height and width in pixels: [800,1344]"


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The keys of `batch`: how a student step is made up."""

    labeled: Images
    unlabeled: Annotated[int, Limits(ge=0, le=65_536)]
    micro: Images | None
    ratio: Literal["exact", "bernoulli"]
    anneal_steps: Annotated[int, Limits(ge=0, le=10**9)]
    group_by_aspect: Literal["joint", "separate"] | None


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """The keys of `prepare`: the splits that it describes."""

    percents: Annotated[list[Percent], Limits(least=1)] | None
    folds: Annotated[list[Fold], Limits(least=1)] | None
    shots: Annotated[list[Shots], Limits(least=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The keys of `evaluation`: when and how networks are scored."""

    every: SomeStepsOrPart | None
    between: Literal["all", "reported"]
    score_threshold: Share
    batch: Annotated[int, Limits(ge=1, le=4096)]
    set: Literal["val", "tune"] | None = None
    scorer: Literal["quick", "pycocotools"] = "quick"


@dataclass(frozen=True, kw_only=True)
class CheckpointingOptions:
    """The keys of `checkpointing`: when states are saved, and which stay."""

    every: Steps
    keep: Steps
    keep_every: Steps | None


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """The keys of `logging`: how often lines are written, and where else scalars go."""

    every: Steps
    loggers: list[LoggerName | dict[str, Any]]  # a `_target_` and its keys for one that is not shipped


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """The keys of `profile`."""

    pipelines: Annotated[list[Name], Limits(least=1)] | None
    sweep: dict[str, list[Any]] | None
    trace: File | None
    seconds: Annotated[float, Limits(gt=0, le=86_400)]
    rounds: Annotated[int, Limits(ge=1, le=1000)]
    batch: Annotated[int, Limits(ge=1, le=4096)]
    views: Annotated[list[str], Limits(least=1)] | None
    workers: Threads | None


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The keys of `predict`."""

    score: Share


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The keys of `report`: what a report takes time for."""

    resamples: Annotated[int, Limits(ge=0, le=100_000)]
    gallery: Annotated[int, Limits(ge=0, le=100)]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The keys of `export`."""

    size: Annotated[list[Annotated[int, Limits(ge=1, le=16_384)]], Limits(least=2, most=2, words=_TWO)] | None
    score: Share


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """The keys of `view`."""

    images: Annotated[int, Limits(ge=1, le=200)]
    draws: Annotated[int, Limits(ge=1, le=20)]


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """The keys of `init`."""

    dir: File | None


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The keys of `schedule.optimizer` that the program reads; its `_target_` takes the others."""

    lr: Annotated[float, Limits(gt=0, le=1000)]
    weight_decay: Annotated[float, Limits(ge=0, le=1000)]
    decay_norm_and_bias: bool


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The keys of `schedule`."""

    steps: Steps
    optimizer: dict[str, Any]
    warmup_steps: Annotated[int, Limits(ge=0, le=10**9)]
    warmup_factor: Annotated[float, Limits(ge=0, le=1000)]
    decay: Decay | dict[str, Any]  # a `_target_` and its keys for one that is not shipped
    decay_start: Share
    milestones: list[Milestone]
    decay_factor: Annotated[float, Limits(ge=0, le=1000)]
    clip_norm: Positive | None


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """The keys of `suite`."""

    name: Name
    methods: Annotated[list[Name], Limits(least=1)]
    percents: Annotated[list[Percent], Limits(least=1)]
    folds: Annotated[list[Fold], Limits(least=1)]
    seeds: Annotated[list[Seed], Limits(least=1)] | None = None
    shots: Annotated[list[Shots], Limits(least=1)] | None = None
    reference: bool = False
    method_overrides: dict[str, list[str]] = field(default_factory=dict)
    variants: dict[str, list[str]] | None = None
    variant_methods: dict[str, list[Name]] | None = None
    jobs: Annotated[int, Limits(ge=1, le=1024)] | None = None
    cost: dict[str, Positive] = field(default_factory=dict)
    wait: bool | None = None
    retry_failed: bool = True
    status: bool = False
    dry_run: bool = False
    report: bool = False
    cancel: bool = False


@dataclass(frozen=True, kw_only=True)
class SmallOptions:
    """The keys of `data.small`: image and anchor sizes of a dataset for the CPU preset."""

    short_side: Pixels
    max_side: Pixels | None = None
    anchor_sizes: Annotated[list[Pixels], Limits(least=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    """Pseudo labels made before training."""

    stage1: Name
    threshold: Share
    stage1_overrides: list[str] | None = None
    checkpoint: File | None = None
    labels: File | None = None
    labeller: Name | None = None
    keep_top1: bool = True
    score_threshold: Share = 0.05
    float16: bool = True
    drop_empty: bool = True


@dataclass(frozen=True, kw_only=True)
class CliOptions:
    """The keys of `cli`."""

    overrides: list[str]
    config_dirs: list[str]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration; groups with a constructor of their own are looked at afterwards."""

    data: dict[str, Any]
    detector: dict[str, Any]
    method: dict[str, Any]
    pipeline: dict[str, Any]
    launcher: dict[str, Any]
    schedule: ScheduleOptions
    augment: dict[str, Any]
    split: SplitOptions
    detector_style: Literal["torchvision", "detectron", "mmdetection", "tensorpack"]
    seed: Seed | None
    batch: BatchOptions
    check: Literal["quick", "headers", "full"]
    export_dir: File | None
    prepare: PrepareOptions
    evaluation: EvaluationOptions
    precision: Literal["fp32", "bf16"]
    channels_last: bool
    compile: bool
    device: Literal["auto", "cpu", "cuda"]
    devices: Annotated[int, Limits(ge=1, le=256)]
    threads: Annotated[int, Limits(ge=1, le=1024)]
    checkpointing: CheckpointingOptions
    logging: LoggingOptions
    runs_dir: File
    run_dir: File | None
    profile: ProfileOptions
    report: ReportOptions
    out: File | None
    model: File | None
    network: Literal["student", "teacher"] | None
    images: File | Annotated[list[File], Limits(least=1, words="a list of paths, [A,B]")] | None
    predict: PredictOptions
    format: Literal["safetensors", "pt", "onnx", "pt2"] | None
    export: ExportOptions
    init: InitOptions
    view: ViewOptions
    cache_dir: File | None
    preset_name: Name | None
    cli: CliOptions
    suite: SuiteOptions | None = None
    variant: Name | None = None


@dataclass(frozen=True, kw_only=True)
class DetectorKeys:
    """Of a detector's keys those that its constructor does not take."""

    backbone_lr_scale: Positive | None = None
    start: File | None = None
    start_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class MethodKeys:
    """Of a method's keys those that its class does not take."""

    name: Name
    augment: Name
    unlabeled: bool | None = None  # whether it draws unlabelled images; None: its class's views say so
    offline: OfflineOptions | None = None
