"""The proof on a GPU in its reduced form on the CPU: every part runs and writes what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
METHODS = Path(__file__).parents[2] / "harness" / "conf" / "method"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--reduced", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1400)
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert done.returncode == 0, (done.stdout, done.stderr, found)
    assert found["ends"] == dict.fromkeys(["tests", "steps", "pipelines", "coco", "quick", "methods"], "done")
    assert found["tests"]["exit_code"] == 0
    assert found["tests"]["decoders"]["mean"] < 2
    assert max(found["steps"]["largest_relative_difference"]) == 0  # the same device twice
    assert set(found["pipelines"]["small"]["pipelines"]) == {"dali", "torchvision"}
    assert "teacher" in found["coco"]["soft_teacher bf16 channels_last"]["step"]["stages_ms"]
    assert [cell["status"] for cell in found["quick"]["cells"]] == ["ok"]
    assert {name.split()[0] for name in found["methods"]} == {file.stem for file in METHODS.glob("*.yaml")}
    assert all(one["step"]["ms"] > 0 for one in found["methods"].values())


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_cut_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    script = tmp_path / "gpu.py"
    script.write_text(
        SCRIPT.read_text().replace(
            "    from benchmarks.gpu_steps import losses\n",
            "    write(out, 'steps', {'so': 'far'})\n    time.sleep(600)\n",
        )
    )
    code = (
        "import runpy, sys; from pathlib import Path\n"
        f"gpu = runpy.run_path({str(script)!r})\n"
        f"gpu['with_deadline'].__globals__['ROOT'] = Path({str(SCRIPT.parents[1])!r})\n"
        f"out = Path({str(tmp_path)!r})\n"
        "print(gpu['with_deadline']('steps', out, True, out, 30.0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cut at its deadline"
    assert json.loads((tmp_path / "steps.json").read_text()) == {"so": "far"}
