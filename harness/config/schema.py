"""The configuration's keys, as types: what each may be, within which bounds, and which are known at all.

The groups `data`, `detector`, `method` and `pipeline` are checked against the constructors that they name, and
`augment` against `pipelines.policy`. What no machine can mean is out of bounds, before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from harness.core.validate import File, Images, Limits, Name, Pixels, Positive, Seed, Share, Steps, Threads

Percent = Annotated[float, Limits(gt=0, le=100)]
Fold = Annotated[int, Limits(ge=1, le=10)]
Milestone = Annotated[
    float,
    Limits(gt=0, le=1e9, words="a step, or below 1 a fraction of the schedule, above 0: [120000,160000], or []"),
]

_TWO = "a list of two, height and width in pixels: [800,1344]"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The keys of `split`: which images are labelled."""

    protocol: Literal["stac", "soft_teacher", "unbiased_teacher", "ids", "annotated", "full"]
    percent: Percent
    fold: Fold
    offset: Annotated[int, Limits(ge=0, le=2**32 - 11)]  # fold + offset seeds NumPy's legacy generator: 32 bits
    index_file: File | None
    empty_images: Literal["keep", "drop", "drop_unannotated"] | None
    crowd_boxes: Literal["keep", "drop"] | None
    min_side: Annotated[int, Limits(ge=0, le=100_000)] | None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The keys of `batch`: how a student step is made up."""

    labeled: Images
    unlabeled: Annotated[int, Limits(ge=0, le=65_536)]
    micro: Images | None
    ratio: Literal["exact", "bernoulli"]
    anneal_steps: Annotated[int, Limits(ge=0, le=10**9)]
    group_by_aspect: Literal["joint", "separate"] | None


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """The keys of `prepare`: the splits that it describes."""

    percents: Annotated[list[Percent], Limits(least=1)] | None
    folds: Annotated[list[Fold], Limits(least=1)] | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The keys of `evaluation`: when and how networks are scored."""

    every: Annotated[float, Limits(gt=0, le=1e9)] | None
    between: Literal["all", "reported"]
    score_threshold: Share
    batch: Annotated[int, Limits(ge=1, le=4096)]


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """The keys of `checkpointing`: when states are saved, and which stay."""

    every: Steps
    keep: Steps
    keep_every: Steps | None


@dataclass(frozen=True, kw_only=True)
class Logging:
    """The keys of `logging`: how often lines are written, and where else scalars go."""

    every: Steps
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The keys of `profile`."""

    pipelines: Annotated[list[Name], Limits(least=1)]
    seconds: Annotated[float, Limits(gt=0, le=86_400)]
    rounds: Annotated[int, Limits(ge=1, le=1000)]
    batch: Annotated[int, Limits(ge=1, le=4096)]
    views: Annotated[list[str], Limits(least=1)] | None
    workers: Threads | None


@dataclass(frozen=True, kw_only=True)
class Predict:
    """The keys of `predict`."""

    score: Share


@dataclass(frozen=True, kw_only=True)
class Export:
    """The keys of `export`."""

    size: Annotated[list[Annotated[int, Limits(ge=1, le=16_384)]], Limits(least=2, most=2, words=_TWO)] | None
    score: Share


@dataclass(frozen=True, kw_only=True)
class View:
    """The keys of `view`."""

    images: Annotated[int, Limits(ge=1, le=200)]
    draws: Annotated[int, Limits(ge=1, le=20)]


@dataclass(frozen=True, kw_only=True)
class Init:
    """The keys of `init`."""

    dir: File | None


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The keys of `optimizer`."""

    name: Literal["sgd", "adamw"]
    lr: Annotated[float, Limits(gt=0, le=1000)]
    weight_decay: Annotated[float, Limits(ge=0, le=1000)]
    decay_norm_and_bias: bool
    momentum: Share | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The keys of `schedule`."""

    steps: Steps
    optimizer: Optimizer
    warmup_steps: Annotated[int, Limits(ge=0, le=10**9)]
    warmup_factor: Annotated[float, Limits(ge=0, le=1000)]
    decay: Literal["flat", "step", "linear", "cosine"]
    decay_start: Share
    milestones: list[Milestone]
    decay_factor: Annotated[float, Limits(ge=0, le=1000)]
    clip_norm: Positive | None


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """The keys of `launcher`."""

    name: Literal["local", "slurm"]


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The keys of `slurm`."""

    name: Literal["slurm"]
    cluster: Literal["slurm", "local"]
    nodes: Annotated[int, Limits(ge=1, le=1024)]
    partition: str | None
    account: str | None
    minutes: Annotated[int, Limits(ge=1, le=10**6)]
    cpus_per_device: Annotated[int, Limits(ge=1, le=1024)]
    memory_gb: Annotated[float, Limits(gt=0, le=100_000)] | None
    parameters: dict[str, Any]
    requeues: Annotated[int, Limits(ge=0, le=10_000)]
    logs: File | None
    wait: bool


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The keys of `suite`."""

    name: Name
    methods: Annotated[list[Name], Limits(least=1)]
    percents: Annotated[list[Percent], Limits(least=1)]
    folds: Annotated[list[Fold], Limits(least=1)]
    seeds: Annotated[list[Seed], Limits(least=1)] | None = None
    reference: bool = False
    method_overrides: dict[str, list[str]] = field(default_factory=dict)
    jobs: Annotated[int, Limits(ge=1, le=1024)] | None = None
    cost: dict[str, Positive] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Small:
    """What the CPU preset takes from a dataset."""

    short_side: Pixels
    max_side: Pixels | None = None
    anchor_sizes: Annotated[list[Pixels], Limits(least=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class Offline:
    """Pseudo labels made before training."""

    stage1: Name
    threshold: Share
    stage1_overrides: list[str] | None = None
    checkpoint: File | None = None
    keep_top1: bool = True
    score_threshold: Share = 0.05
    float16: bool = True
    drop_empty: bool = True


@dataclass(frozen=True, kw_only=True)
class Cli:
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
    schedule: Schedule
    augment: dict[str, Any]
    split: Split
    detector_style: Literal["torchvision", "detectron", "mmdetection", "tensorpack"]
    seed: Seed | None
    batch: Batch
    check: Literal["quick", "headers", "full"]
    export_dir: File | None
    prepare: Prepare
    evaluation: Evaluation
    precision: Literal["fp32", "bf16"]
    channels_last: bool
    compile: bool
    device: Literal["auto", "cpu", "cuda"]
    devices: Annotated[int, Limits(ge=1, le=256)]
    threads: Annotated[int, Limits(ge=1, le=1024)]
    checkpointing: Checkpointing
    logging: Logging
    runs_dir: File
    run_dir: File | None
    profile: Profile
    out: File | None
    model: File | None
    network: Literal["student", "teacher"] | None
    images: File | Annotated[list[File], Limits(least=1)] | None
    predict: Predict
    format: Literal["safetensors", "pt", "onnx", "pt2"] | None
    export: Export
    view: View
    init: Init
    cache_dir: File | None
    preset_name: Name | None
    cli: Cli
    suite: Suite | None = None


@dataclass(frozen=True, kw_only=True)
class MethodKeys:
    """Of a method's keys those that its class does not take."""

    name: Name
    augment: Name
    offline: Offline | None = None
