"""How long a report takes: 5 methods x 4 ratios x 5 folds x 3 seeds with 80 classes, without bootstrap and gallery."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from harness.core.record import write_record
from harness.core.types import RunRecord
from harness.engine.accumulate import METRICS
from harness.engine.errors import KINDS
from harness.report import report

METHODS = ("supervised", "stac", "unbiased_teacher", "soft_teacher", "mean_teacher")
CLASSES = tuple(f"class {number}" for number in range(80))


def make(folder: Path) -> None:
    """300 finished runs with per-class scores, errors by kind and 100 lines of metrics."""
    rng = np.random.default_rng(0)
    for (place, method), percent, fold, seed in product(enumerate(METHODS), (1, 2, 5, 10), range(1, 6), (1, 2, 3)):
        ap = 10 + 8 * float(np.log2(1 + percent)) + 3 * place + rng.normal()
        metrics = dict.fromkeys(METRICS, ap)
        record = RunRecord(
            status="ok",
            cell=f"coco_{method}_stac-{percent}pct-fold{fold}_seed{seed}",
            suite="coco",
            method=method,
            preset="paper",
            detector="faster_rcnn_r50",
            dataset="coco",
            protocol="stac",
            percent=float(percent),
            fold=fold,
            seed=seed,
            split_sha256=f"{percent} {fold}",
            labeled_images=1173 * percent,
            unlabeled_images=100_000,
            eval_images=5000,
            steps=180_000,
            batch_labeled=8,
            batch_unlabeled=32 if place else 0,
            images_labeled=1_440_000,
            images_unlabeled=5_760_000 if place else 0,
            train_seconds=1e5,
            reported_network="teacher",
            **{key: metrics[key] for key in ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")},
            scores={"student": metrics, "teacher": metrics},
            per_class=dict.fromkeys(CLASSES, metrics),
            errors={kind: {"count": 100.0, "lost_ap50": 2.0} for kind in KINDS},
            environment={"gpus": ["one"], "threads": 1},
            config={"split": {"percent": percent, "fold": fold}, "seed": seed, "method": {"name": method}},
        )
        run_dir = folder / "coco" / record.cell
        write_record(run_dir / "record.json", record)
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _lines(ap)))


def _lines(ap: float) -> list[dict[str, Any]]:
    steps = range(0, 180_000, 4500)
    lines: list[dict[str, Any]] = [{"kind": "train", "step": step, "loss": 1.0} for step in steps]
    quality = {"box": {"precision": 0.8, "recall": 0.5, "iou": 0.7, "labels": 9.0}}
    lines += [{"kind": "pseudo", "step": step, "quality": quality} for step in steps]
    return lines + [{"kind": "eval", "step": s, "network": "teacher", "metrics": {"ap": ap}} for s in range(9, 30)]


def test_report_of_300_records(tmp_path: Path, benchmark: Any) -> None:
    make(tmp_path)
    page = benchmark.pedantic(report.run, (tmp_path, tmp_path / "out", 0, 0), rounds=3)
    print(f"{page.stat().st_size / 1e6:.1f} MB")
