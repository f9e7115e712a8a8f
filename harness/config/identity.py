"""The identity of a run: the part of its configuration that decides its result, its hash, and differences of two."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.config import moved

# Keys that say where and how a run is carried out, not what it computes: they may change when a run is taken up again.
_CIRCUMSTANCES = (
    "runs_dir",
    "run_dir",
    "cache_dir",
    "device",
    "devices",
    "threads",
    "logging",
    "checkpointing",
    "launcher",
    "suite",
    "variant",  # a name; what it changes is told by the other keys
    "data.root",
    "pipeline.threads",
    "pipeline.prefetch",
    "evaluation.scorer",  # both give the same numbers
    "method.offline.checkpoint",
    "method.unlabeled",  # says what its class does in any case
    "detector.cache_dir",
    "detector.start",  # start_sha256 says which weights they are
    "data.cache_dir",
    "out",
    "model",
    "network",
    "images",
    "predict",
    "format",
    "export",
    "init",
    "view",
    "cli",
    "profile",
    "report",
    "prepare",
    "check",
    "export_dir",
)
# Keys that came after runs had been made: null is what those did, so that such runs keep their identity.
_ADDED = (
    "batch.group_by_aspect",
    "method.rise",
    "method.ema.gamma",
    "method.ema.interval",
    "method.ema.first",
    "method.adaptive",
    "detector.backbone_lr_scale",
    "detector.start_sha256",
    "detector.backbone",
    "detector.quality",
    "detector.scales",
    "detector.score",
    "split.holdout",
    "split.tune",
    "split.shots",
    "evaluation.set",
    "method.offline.labels",
    "method.offline.labeller",
)
# The same of one form of datasets; of COCO's the key is as old as the form.
_ADDED_TO_DATA = {
    "harness.voc.voc_dataset": ("data.unlabeled_images",),
    "harness.data.yolo.yolo_dataset": ("data.unlabeled_images",),
}
# The same of one constructor of detectors; in the others the keys are as old.
_ADDED_TO_DETECTOR = {
    "detectors.faster_rcnn.small_faster_rcnn": ("detector.norm", "detector.frozen_stages"),
}
# The same in torchvision's style of detectors alone; in the others null now means something else than it did.
_ADDED_IN_TORCHVISION_STYLE = (
    "detector.rpn.low_quality_iou",
    "detector.rpn.low_quality_of",
    "detector.rpn.candidates",
)


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The configuration without the circumstances under which it is carried out: what decides a run's result."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return without_circumstances({str(key): value for key, value in plain.items()})


def without_circumstances(plain: dict[str, Any]) -> dict[str, Any]:
    """`identity` of a configuration that is plain data already, such as a record's; changes what it is given."""
    for dotted in _CIRCUMSTANCES:
        _remove(plain, dotted)
    moved.first(plain)
    form = (plain.get("data") or {}).get("_target_")
    network = plain.get("detector") or {}
    style = network.get("style")
    added = _ADDED + _ADDED_TO_DATA.get(str(form), ()) + _ADDED_TO_DETECTOR.get(str(network.get("_target_")), ())
    for dotted in added + (_ADDED_IN_TORCHVISION_STYLE if style == "torchvision" else ()):
        _remove(plain, dotted, where_null=True)
    return plain


def _remove(plain: dict[str, Any], dotted: str, where_null: bool = False) -> None:
    """Takes a dotted key out of nested dictionaries, if it is there (and null)."""
    *parents, last = dotted.split(".")
    node: Any = plain
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict) and (not where_null or node.get(last) is None):
        node.pop(last, None)


def is_circumstance(key: str) -> bool:
    """Whether a dotted key, or the group that it is in, is left out of `identity`."""
    return any(key == known or key.startswith(f"{known}.") for known in _CIRCUMSTANCES)


def config_sha256(cfg: DictConfig) -> str:
    """Hash of `identity`."""
    return sha256_of(identity(cfg))


def sha256_of(identity: dict[str, Any]) -> str:
    """Hash of what `identity` gives."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found
