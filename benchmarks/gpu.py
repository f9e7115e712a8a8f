"""What a GPU is to prove, in one command: `python benchmarks/gpu.py [--out DIR] [--reduced]`.

Parts run in order of priority, each in a process of its own with a deadline, and each writes DIR/NAME.json as soon as
it is done, so that a cut leaves the rest. All of them take at most nine minutes on one H100:

 1. `tests`: those marked `gpu`, and how far nvJPEG's pixels are from libjpeg-turbo's;
 2. `steps`: a training step in fp32, bf16 and compiled, and 20 steps on the GPU beside 20 on the CPU;
 3. `pipelines`: images/s of every policy at COCO's scale beside torchvision with all cores, decoding alone, and copying
    to the device;
 4. `coco`: Soft Teacher and supervised, ResNet-50, at COCO's scale by stages: fp32, bf16, channels_last, compiled;
 5. `quick`: the nine cells of `suite=quick` on the GPU;
 6. `methods`: a step of every method there is, by stages, with the small detectors (`benchmarks/methods.py`).

Without a GPU, or with --reduced, every part runs in a small form on the CPU. Pictures are generated, in COCO's sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAPER_IMAGES_PER_S = 55.6  # of Soft Teacher's eight V100 (40 images in 0.72 s), to compare with, not to reach
# seconds; 540 in all
DEADLINES = {"tests": 100, "steps": 75, "pipelines": 95, "coco": 135, "quick": 75, "methods": 60}


def pictures(folder: Path, count: int) -> Path:
    """A dataset in COCO's format: photograph-like JPEG files of COCO's sizes with seven boxes each."""
    import numpy as np
    from PIL import Image

    if (folder / "train.json").exists():
        return folder
    rng = np.random.default_rng(0)
    shapes = [(480, 640), (427, 640), (640, 480), (640, 427), (500, 375), (375, 500)]
    for part, number in (("train", count), ("val", max(4, count // 10))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for image in range(1, number + 1):
            height, width = shapes[int(rng.integers(len(shapes)))]
            layers = [rng.integers(0, 256, (4 * 3**i, 5 * 3**i, 3), dtype=np.uint8) for i in range(4)]
            resized = [np.asarray(Image.fromarray(one).resize((width, height)), np.float32) for one in layers]
            pixels = np.mean(resized, axis=0).astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{image}.jpg", quality=90)
            images.append({"id": image, "file_name": f"{image}.jpg", "height": height, "width": width})
            for _ in range(7):
                w, h = rng.uniform(20, width / 2), rng.uniform(20, height / 2)
                box = [rng.uniform(0, width - w), rng.uniform(0, height - h), w, h]
                own = {"id": len(annotations) + 1, "image_id": image, "category_id": int(rng.integers(1, 81))}
                annotations.append({**own, "bbox": [float(v) for v in box], "area": float(w * h), "iscrowd": 0})
        categories = [{"id": k, "name": f"class {k}"} for k in range(1, 81)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{part}.json").write_text(json.dumps(content))
    return folder


def of_pictures(folder: Path) -> list[str]:
    """Overrides that choose these pictures."""
    return ["data=custom", f"data.root={folder}"]


def command(out: Path, name: str, *overrides: str) -> dict[str, Any]:
    """Runs `ssodbench` and gives what it wrote to `out`, or why there is nothing."""
    file = out / f"{name}.json"
    words = [sys.executable, "-m", "harness.cli", *overrides, f"out={file}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not file.exists():
        return {"failed": (done.stderr or done.stdout).strip().splitlines()[-3:]}
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def tests(out: Path, reduced: bool, cache: Path) -> dict[str, Any]:
    """The tests marked gpu, and the difference between the decoders."""
    selected = ["tests/pipelines/test_gpu.py", *([] if reduced else ["-m", "gpu"])]
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *selected]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {"exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-12:]}
    write(out, "tests", found)
    return {**found, "decoders": decoders(pictures(cache / "pictures", 24 if reduced else 600), reduced)}


def decoders(folder: Path, reduced: bool) -> dict[str, float]:
    """By how many levels the GPU's decoder differs from the CPU's; on a CPU, PIL from DALI."""
    import numpy as np
    from PIL import Image

    files = sorted((folder / "train").glob("*.jpg"))[:16]
    data = [np.fromfile(file, np.uint8) for file in files]
    on_cpu = decoded(data, gpu=False)
    other = [np.asarray(Image.open(file)) for file in files] if reduced else decoded(data, gpu=True)
    apart = np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in zip(on_cpu, other, strict=True)])
    return {"mean": float(apart.mean()), "p99": float(np.percentile(apart, 99)), "max": float(apart.max())}


def decoded(data: list[Any], gpu: bool) -> list[Any]:
    """Pixels of JPEG files, as DALI decodes them on either device."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(data), num_threads=2, device_id=0 if gpu else None)
    def graph() -> Any:
        files = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(files, device="mixed" if gpu else "cpu", output_type=types.RGB)

    pipeline = graph()
    pipeline.build()
    pipeline.feed_input("data", data)
    (images,) = pipeline.run()
    return [np.asarray(image) for image in (images.as_cpu() if gpu else images)]


def steps(out: Path, reduced: bool, cache: Path) -> dict[str, Any]:
    """Twenty steps on either device from the same weights, then the precisions."""
    from benchmarks.gpu_steps import losses

    device = "cpu" if reduced else "cuda"
    count = 3 if reduced else 20
    on_cpu, on_device = losses("cpu", count, cache), losses(device, count, cache)
    found: dict[str, Any] = {
        "cpu": on_cpu,
        device: on_device,
        "largest_relative_difference": [abs(a - b) / abs(a) for a, b in zip(on_cpu, on_device, strict=True)],
    }
    write(out, "steps", found)
    for name, overrides in {"bf16": ["precision=bf16"], "compiled": ["compile=true"]}.items():
        if reduced and name == "compiled":
            continue  # it compiles for a minute on a CPU
        found[name] = losses(device, count, cache, *overrides)
        write(out, "steps", found)
    return found


def pipelines(out: Path, reduced: bool, cache: Path) -> dict[str, Any]:
    """Policies one by one; a cut leaves those that are done."""
    folder = pictures(cache / "pictures", 24 if reduced else 600)
    names = ["small"] if reduced else ["soft_teacher", "supervised", "stac", "unbiased_teacher", "soft_teacher_mmdet"]
    seconds = "0.2" if reduced else "4"
    found: dict[str, Any] = {}
    for name in names:
        settings = [f"augment={name}", f"profile.seconds={seconds}", "profile.rounds=2", f"cache_dir={cache}"]
        if reduced:
            settings += ["profile.workers=0", "profile.batch=4", "device=cpu"]
        both = "profile.pipelines=[dali,torchvision]"
        found[name] = command(out, f"pipelines_{name}", "profile", *of_pictures(folder), both, *settings)
        write(out, "pipelines", found)
    return {**found, "host_to_device_gb_per_s": None if reduced else copying()}


def copying() -> dict[str, float]:
    """Rate of copies of a COCO-scale batch, from pinned memory and from other."""
    import torch

    found = {}
    for name, pinned in (("pinned", True), ("pageable", False)):
        batch = torch.empty(8, 3, 1344, 1344, pin_memory=pinned)
        batch.cuda()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            batch.cuda(non_blocking=True)
        torch.cuda.synchronize()
        found[name] = 10 * batch.numel() * 4 / (time.perf_counter() - begin) / 1e9
    return found


def coco(out: Path, reduced: bool, cache: Path) -> dict[str, Any]:
    """Steps of the papers' size, each setting on its own, the most telling ones first."""
    folder = pictures(cache / "pictures", 24 if reduced else 600)
    settings = {
        "soft_teacher bf16 channels_last": ["method=soft_teacher", "precision=bf16", "channels_last=true"],
        "soft_teacher fp32": ["method=soft_teacher", "precision=fp32"],
        "supervised bf16 channels_last": ["method=supervised", "precision=bf16", "channels_last=true"],
        "soft_teacher bf16": ["method=soft_teacher", "precision=bf16"],
        "supervised fp32": ["method=supervised", "precision=fp32"],
        "soft_teacher bf16 channels_last compiled": [
            *("method=soft_teacher", "precision=bf16", "channels_last=true", "compile=true"),
        ],
    }
    found: dict[str, Any] = {"paper_images_per_s": PAPER_IMAGES_PER_S}
    scale = ["preset=paper", "detector.weights=scratch", "pipeline.threads=12", "profile.seconds=6", "profile.rounds=1"]
    if reduced:
        scale = ["batch.labeled=2", "batch.unlabeled=2", "detector.weights=scratch", "device=cpu", "profile.rounds=1"]
        scale += ["profile.seconds=0.1"]
        settings = dict(list(settings.items())[:1])
    for name, own in settings.items():
        place = [*of_pictures(folder), "split.percent=10", "split.protocol=stac", f"cache_dir={cache}"]
        found[name] = command(out, f"coco_{name.replace(' ', '_')}", "profile", *place, *scale, *own)
        write(out, "coco", found)
    return found


def quick(out: Path, reduced: bool, cache: Path) -> dict[str, Any]:
    """The nine cells side by side on one GPU; records of those that finish."""
    words = [sys.executable, "-m", "harness.cli", "suite", "suite=quick", f"runs_dir={out / 'runs'}"]
    words += [f"cache_dir={cache}", "logging.loggers=[]", "report.gallery=0", "report.resamples=0"]
    if reduced:
        words += ["suite.methods=[supervised]", "suite.percents=[20]", "schedule=smoke", "data.train_images=24"]
        words += ["data.val_images=4", "detector.weights=scratch", "device=cpu", "suite.jobs=1"]
    else:
        words += ["device=cuda", "suite.jobs=9"]
    begin = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    records = [json.loads(file.read_text()) for file in sorted((out / "runs").glob("*/*/record.json"))]
    keys = ("cell", "status", "ap", "wall_seconds", "images_per_s", "data_stall", "peak_gpu_memory_mb")
    seconds = time.perf_counter() - begin
    return {
        "exit_code": done.returncode,
        "seconds": seconds,
        "cells": [{key: record.get(key) for key in keys} for record in records],
        "said": (done.stderr or done.stdout).strip().splitlines()[-3:],
    }


def methods(out: Path, reduced: bool, cache: Path) -> dict[str, Any]:
    """A short profile of each; a cut leaves those that are done."""
    from benchmarks.methods import DETECTORS, pairs

    settings = ["data.train_images=80", "data.val_images=4", "detector.weights=scratch", "split.percent=20"]
    settings += [f"cache_dir={cache}", "profile.rounds=1", f"profile.seconds={'0.1' if reduced else '1.5'}"]
    settings += ["device=cpu", "batch.labeled=4"] if reduced else ["device=cuda"]
    found: dict[str, Any] = {}
    for method, detector in pairs():
        options = [f"detector.{key}={json.dumps(value)}" for key, value in DETECTORS[detector].items()]
        own = [f"method={method}", f"detector={detector}", *options]
        if reduced and method != "supervised":
            own.append("batch.unlabeled=4")
        found[f"{method} {detector}"] = command(out, f"step_{method}_{detector}", "profile", *settings, *own)
        write(out, "methods", found)
    return found


PARTS: dict[str, Callable[[Path, bool, Path], dict[str, Any]]] = {
    "tests": tests,
    "steps": steps,
    "pipelines": pipelines,
    "coco": coco,
    "quick": quick,
    "methods": methods,
}


def write(out: Path, name: str, found: dict[str, Any]) -> None:
    """A part's JSON, whole at any moment."""
    new = out / f".{name}.json"
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(out / f"{name}.json")


def machine() -> dict[str, Any]:
    """What it runs on."""
    import torch

    from harness.core.record import environment

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "environment": environment()}


def with_deadline(name: str, out: Path, reduced: bool, cache: Path, seconds: float) -> str:
    """Runs a part in a process of its own; how it ended."""
    words = [sys.executable, str(Path(__file__)), "--part", name, "--out", str(out), "--cache", str(cache)]
    process = subprocess.Popen([*words, *(["--reduced"] if reduced else [])], cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return "cut at its deadline"
    return "done" if code == 0 else f"failed with exit code {code}"


def main(arguments: list[str] | None = None) -> int:
    """Gives 0 where every part was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu")))
    parser.add_argument("--cache", type=Path, default=None, help="where datasets are generated; default: OUT/cache")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--part", choices=PARTS, help="this one alone, in this process")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="these alone")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    cache = (given.cache or out / "cache").resolve()
    sys.path.insert(0, str(ROOT))
    import torch

    reduced = given.reduced or not torch.cuda.is_available()
    if given.part:
        write(out, given.part, PARTS[given.part](out, reduced, cache))
        return 0
    write(out, "machine", {**machine(), "reduced": reduced})
    pictures(cache / "pictures", 24 if reduced else 600)
    ends = {}
    for name in given.parts:
        begin = time.perf_counter()
        ends[name] = with_deadline(name, out, reduced, cache, 600 if reduced else DEADLINES[name])
        print(f"{name}: {ends[name]}, {time.perf_counter() - begin:.0f} s", flush=True)
        write(out, "ends", ends)
    return int(any(end != "done" for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
