# %% [markdown]
# # ssodbench from Python
# Train twice on a generated dataset, compare, look at what a network finds. A test runs this file; every cell can be
# run in a notebook or an editor that knows `# %%`.

# %%
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from harness import api

folder = Path(sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "tour")
small = ["data.train_images=80", "data.val_images=16", "schedule=smoke", "evaluation.every=null"]  # a minute, no more
where = ["pipeline=torchvision", "pipeline.threads=0", "device=cpu"]

# %% Train. Run this cell again, or after an interruption: what is there is kept.
for method in ("supervised", "mean_teacher"):
    cfg = api.load_config(f"method={method}", "split.percent=20", *small, *where, run_dir=folder / method)
    run = api.train(cfg)
    print(f"{method}: AP {run.record.ap:.1f} of the {run.record.reported_network}, {run.record.wall_seconds:.0f} s")

# %% Records are a table.
table = api.records(folder)
print(table[["method", "percent", "labeled_images", "steps", "ap", "ap50", "images_per_s"]].to_string(index=False))

# %% So is what was logged.
logged = run.metrics()
print(logged[logged.kind == "train"][["step", "loss"]].tail(3).to_string(index=False))

# %% A network, on arrays.
network = run.network("teacher")
picture = np.asarray(Image.open(sorted(Path(run.config().cache_dir).rglob("*.jpg"))[0]).convert("RGB"))
(found,) = network.detect([picture], score=0.05)
print(network.classes, len(found.boxes), "boxes, the best:", found.names[:1], found.scores[:1].round(2))
