"""Makes the records of speed in results/reference/: pipelines side by side, and training steps stage by stage.

    python benchmarks/speed_records.py --coco DIR [--only NAME...]

DIR holds photographs in COCO's layout. About 20 minutes on an otherwise idle machine, one command at a time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
ALONE, PAIR = "profile.workers=0", "profile.workers=2"
SOURCE = ("augment=soft_teacher", "augment.color_at=source")
SMALL = ("augment=small", "profile.batch=16")
TWICE = ("data.small.short_side=256", "data.small.max_side=432")
PIPELINES = {
    "soft_teacher-view": ("augment=soft_teacher", ALONE),
    "soft_teacher-view-2workers": ("augment=soft_teacher", PAIR),
    "soft_teacher-source": (*SOURCE, ALONE),
    "soft_teacher-source-2workers": (*SOURCE, PAIR),
    "soft_teacher_mmdet": ("augment=soft_teacher_mmdet", ALONE),
    "stac-strong": ("augment=stac", "profile.views=[strong]", ALONE),
    "unbiased_teacher": ("augment=unbiased_teacher", ALONE),
    "supervised": ("augment=supervised", ALONE),
    "small-128": (*SMALL, ALONE),
    "small-128-2workers": (*SMALL, PAIR),
    "small-256": (*SMALL, *TWICE, ALONE),
    "small-256-2workers": (*SMALL, *TWICE, PAIR),
}
STEPS = {
    f"quick_{method}": (f"method={method}", "profile.seconds=12", "profile.rounds=3")
    for method in ("supervised", "stac", "soft_teacher")
}
COCO_STEP = (
    *("method=soft_teacher", "preset=paper", "detector.weights=scratch", "batch.labeled=1", "batch.unlabeled=1"),
    *("batch.micro=2", "threads=2", "pipeline.threads=2", "split.percent=50", "profile.rounds=1", "device=cpu"),
)


def commands(coco: str) -> dict[str, tuple[str, ...]]:
    """`FOLDER/NAME` below results/reference -> overrides of `ssodbench profile`.

    Args:
        coco: a folder of photographs in COCO's layout.
    """
    data = ("data=coco", f"data.root={coco}")
    side_by_side = (*data, "profile.pipelines=[dali,torchvision,opencv]", "profile.seconds=8", "profile.rounds=4")
    return {
        **{f"pipelines-2cores/{name}": (*side_by_side, *own) for name, own in PIPELINES.items()},
        **{f"profiles-2cores/{name}": own for name, own in STEPS.items()},
        "profiles-2cores/coco_soft_teacher": (*data, *COCO_STEP),
    }


def main() -> int:
    """Makes the records that are asked for; one that fails is said and does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", required=True, help="folder of photographs in COCO's layout")
    parser.add_argument("--only", nargs="+", help="such as profiles-2cores/quick_stac")
    options = parser.parse_args()
    failed = 0
    for place, overrides in commands(options.coco).items():
        if options.only is None or place in options.only:
            out = REFERENCE / f"{place}.json"
            out.parent.mkdir(exist_ok=True)
            print(place, flush=True)
            command = [sys.executable, "-m", "harness.cli", "profile", *overrides, f"out={out}"]
            failed += subprocess.run(command, check=False).returncode != 0
            out.with_suffix(".svg").unlink(missing_ok=True)  # a report draws it anew
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
