"""A network that a run has trained, ready for use: out of the run's folder, or out of a file that `export` wrote."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from detectors.detector import Detector
from harness.config import saved, sections
from harness.config.identity import config_sha256, differences, without_circumstances
from harness.config.identity import identity as identity_of
from harness.config.names import cell_name, group_name
from harness.config.sections import FeedOptions
from harness.core import files, readback
from harness.core.distributed import World
from harness.core.record import read_record
from harness.core.types import Pipeline, UserError
from harness.core.validate import Limits
from harness.engine import build, checkpoint

FORMAT: Literal["ssodbench.detector/1"] = "ssodbench.detector/1"
_KEY = "ssodbench"  # of the description, within either kind of file
_REMEDY = "export it again (ssodbench export run_dir=DIR out=FILE)"


class Description(msgspec.Struct, kw_only=True):
    """What a file says about its network: all that is needed to build and use it, and where it comes from."""

    format: Literal["ssodbench.detector/1"] = FORMAT
    classes: Annotated[list[str], Limits(least=1)]  # label 1 is the first
    category_ids: list[int]  # of the classes, in the data that the run was trained on
    detector: dict[str, Any]  # its configuration, `_target_` among it
    augment: dict[str, Any]  # the policy's view `test`: how pictures become the network's input
    normalize: dict[str, Any]  # fields of `harness.core.types.Normalize`; the detector's own, for other programs
    network: str  # student or teacher
    step: int  # student steps it was trained for
    cell: str  # the run's name
    dataset: str
    method: str
    config_sha256: str
    pretraining: str  # where its backbone's first weights came from, in words
    version: str  # of ssodbench


@dataclass
class Trained:
    """A network and what is known about it."""

    detector: Detector
    about: Description
    shown_by: DictConfig | None = None  # the pipeline of its run, where it comes out of one

    def pipeline(self, cfg: DictConfig, world: World) -> Pipeline:
        """A pipeline that shows pictures as this network wants them.

        Args:
            cfg: a configuration of which `evaluation.batch` and, unless the run's own is used, `pipeline` are taken.
            world: this process.
        """
        given = any(re.match(r"[+~]*pipeline\b", override) for override in cfg.cli.overrides)
        chosen = cfg.pipeline if given or self.shown_by is None else self.shown_by
        own = sections.group(OmegaConf.create({"pipeline": chosen}), "pipeline")
        own["on_bad_image"] = cfg.pipeline.on_bad_image
        feed = FeedOptions(own, self.about.augment, int(cfg.evaluation.batch))
        return build.pipeline(feed, world, self.detector.normalize)


def open_trained(cfg: DictConfig, device: torch.device | str = "cpu") -> Trained:
    """The network that `model`, or `run_dir` and `network`, name.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    if cfg.model:
        found = read(Path(cfg.model), cfg.cache_dir)
        if cfg.network and cfg.network != found.about.network:
            raise UserError(
                f"network={cfg.network}, but {cfg.model} holds the {found.about.network}: leave network out, or export "
                f"the other one (ssodbench export run_dir=DIR network={cfg.network} out=FILE)"
            )
    else:
        found = of_run(Path(cfg.run_dir), cfg.network, cfg.cache_dir)
    found.detector.to(device).eval()
    return found


def of_run(run_dir: Path, network: str | None, cache_dir: str) -> Trained:
    """A network of a run's newest checkpoint, on the CPU.

    Args:
        run_dir: the run's folder.
        network: `student` or `teacher`; None: the one that the run reports.
        cache_dir: this machine's.

    Raises:
        UserError: there is no run, no checkpoint or no such network, or the files are of different runs.
    """
    if run_dir.is_file():
        raise UserError(
            f"run_dir={run_dir} is a file: a run's folder is meant, and for an exported file model={run_dir}"
        )
    if why := files.trouble(run_dir / "config.yaml"):
        raise UserError(f"there is no run in {run_dir} (config.yaml: {why}): set run_dir to the folder of a run")
    cfg = saved.read_config(run_dir)
    file = checkpoint.find(run_dir)
    state = checkpoint.read(file)
    refuse_other_run(run_dir, file, state["identity"], cfg)
    cfg.cache_dir = cache_dir
    classes, ids = _classes(sections.group(cfg, "data"), Path(cache_dir), state)
    pretraining = _pretraining(run_dir)
    options = detector_options(sections.group(cfg, "detector"), pretraining)
    bare = bare_detector(options, len(classes), cache_dir)
    method = build.method(sections.group(cfg, "method"), bare, cfg.schedule.steps)
    try:
        method.load_state_dict(state["method"])
    except RuntimeError as error:
        raise UserError(checkpoint.misfit(file, error)) from error
    name = network or method.reported
    if name not in method.networks():
        raise UserError(f"network={name}: the run in {run_dir} has no {name}, it has {', '.join(method.networks())}")
    detector = method.networks()[name]
    about = Description(
        classes=classes,
        category_ids=ids,
        detector=options,
        augment=_test_view(sections.group(cfg, "augment")),
        normalize=_plain(detector.normalize),
        network=name,
        step=int(state["step"]),
        cell=cell_name(cfg),
        dataset=group_name(cfg, "data"),
        method=str(cfg.method.get("name", "")),
        config_sha256=state["identity"].get("config", ""),
        pretraining=pretraining,
        version=importlib.metadata.version("ssodbench"),
    )
    return Trained(detector, about, cfg.pipeline)


def refuse_other_run(run_dir: Path, file: Path, identity: Mapping[str, str], trained: DictConfig) -> None:
    """Refuses a checkpoint, or a record, that another run has written.

    Raises:
        UserError: naming it, and what differs.
    """
    own = {"config": config_sha256(trained)}
    path = run_dir / "record.json"
    if path.exists():
        record = read_record(path)
        differing = differences(without_circumstances(record.config), identity_of(trained))
        if differing:
            raise UserError(
                f"{path} is of another run than {run_dir / 'config.yaml'} ({'; '.join(differing[:3])}): put the files "
                "back as one run wrote them, or name another folder"
            )
        own = {
            "config": record.config_sha256,  # as the code of its time made it, like the checkpoint's
            "split": record.split_sha256,
            "dataset": record.dataset_sha256,
            "evaluation set": record.val_sha256,
        }
    differing = [what for what, value in own.items() if value and identity.get(what) != value]
    if differing:
        raise UserError(
            f"the checkpoint {file} is of another run than the rest of {run_dir}, it has another "
            f"{' and another '.join(differing)}: name the run that wrote it, or delete it here"
        )


def _classes(data: Mapping[str, Any], cache_dir: Path, state: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Names and ids of the classes; checkpoints of before leave them to the dataset."""
    if "classes" in state and "category_ids" in state:
        return list(state["classes"]), [int(number) for number in state["category_ids"]]
    try:
        opened = build.dataset(data, cache_dir)
    except UserError:
        if "classes" not in state:
            raise
        return list(state["classes"]), list(range(1, len(state["classes"]) + 1))
    return list(opened.train.category_names), opened.train.category_ids.tolist()


def detector_options(options: Mapping[str, Any], pretraining: str) -> dict[str, Any]:
    """A run's detector without the first weights of its backbone, which its own take the place of.

    Args:
        options: the group `detector` of the run.
        pretraining: what its record says about those weights, which tells the layout of their file, and that what
            pixels the network wants.
    """
    plain = {key: value for key, value in options.items() if key not in ("cache_dir", "start")}
    if str(plain.get("_target_", "")).startswith("detectors.") and plain.get("weights", "scratch") != "scratch":
        plain["weights"] = "later"
        if plain.get("caffe", False) is None:
            plain["caffe"] = "(caffe2 layout)" in pretraining
    return plain


def _test_view(policy: Mapping[str, Any]) -> dict[str, Any]:
    return {**policy, "views": {"test": policy["views"]["test"]}}


def bare_detector(options: Mapping[str, Any], num_classes: int, cache_dir: str) -> Detector:
    """A detector by its configuration, without this machine's cache folder in it."""
    return build.detector({**options, "cache_dir": cache_dir}, Path(cache_dir), num_classes)


def _pretraining(run_dir: Path) -> str:
    path = run_dir / "record.json"
    return read_record(path).pretraining if path.exists() else ""


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON holds it."""
    return msgspec.json.decode(msgspec.json.encode(value))


def encode(trained: Trained, kind: str) -> bytes:
    """A file's content: the weights and the description.

    Args:
        trained: the network.
        kind: `safetensors`, or `pt` for what `torch.load(weights_only=True)` reads.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in trained.detector.state_dict().items()}
    if kind == "safetensors":
        return save_safetensors(state, {_KEY: msgspec.json.encode(trained.about).decode()})
    buffer = io.BytesIO()
    torch.save({_KEY: _plain(trained.about), "weights": state}, buffer)
    return buffer.getvalue()


def read(path: Path, cache_dir: str, key: str = "model") -> Trained:
    """A network out of a file that `encode` made; on the CPU.

    Args:
        path: of the file.
        cache_dir: this machine's.
        key: that names the file, for messages.

    Raises:
        UserError: it cannot be read, is no such file, or does not fit what it says about itself.
    """
    if path.is_dir():
        raise UserError(f"{key}={path} is a folder: for a run's folder say run_dir={path}")
    try:
        content = files.read_bytes(path)
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read ({error.strerror}): give a file that export wrote") from error
    description, state = _decode(path, content, key)
    try:
        about = readback.convert(description, Description)
        readback.require_shallow(path, description, _REMEDY)
    except (ValueError, RecursionError) as error:
        raise readback.damaged(path, str(error), _REMEDY) from error
    if len(about.category_ids) != len(about.classes):
        raise readback.damaged(path, f"{len(about.classes)} classes, {len(about.category_ids)} ids", _REMEDY)
    detector = bare_detector(about.detector, len(about.classes), cache_dir)
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise readback.damaged(path, " ".join(str(error).split()), _REMEDY) from error
    detector.pretraining = about.pretraining
    return Trained(detector, about)


def _decode(path: Path, content: bytes, key: str) -> tuple[Any, dict[str, Tensor]]:
    """Description and weights of either kind of file, told apart by their first bytes."""
    if content[:2] == b"PK":
        return _decode_pt(path, key)
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
        if text is None:
            raise UserError(f"{key}={path} does not say what network it holds: give a file that export wrote")
        return json.loads(text), load_safetensors(content)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{key}={path} is no whole file of weights ({error}): give a file that export wrote") from error


def _decode_pt(path: Path, key: str) -> tuple[Any, dict[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"{key}={path} cannot be read as weights ({type(error).__name__}): give a file that export wrote as "
            ".safetensors or .pt"
        ) from error
    if isinstance(content, dict) and "optimizer" in content and "method" in content:
        raise UserError(f"{key}={path} is a run's checkpoint: say run_dir={path.absolute().parents[1]}, or export it")
    if not isinstance(content, dict) or _KEY not in content or not isinstance(content.get("weights"), dict):
        raise UserError(f"{key}={path} does not say what network it holds: give a file that export wrote")
    return content[_KEY], content["weights"]
