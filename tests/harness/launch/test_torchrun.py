"""torchrun across machines, as the documentation says it: two agents that meet at a fixed address."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.timeout(300)

DOCS = Path(__file__).parents[3] / "docs"
SMALL = [
    *("data=shapes", "data.train_images=40", "data.val_images=12", "detector.weights=scratch", "schedule=smoke"),
    *("split.percent=20", "batch.labeled=4", "batch.micro=2", "logging.loggers=[]", "device=cpu"),
    *("pipeline=torchvision", "method=supervised", "evaluation.every=null"),
]


def _documented() -> list[list[str]]:
    """The commands of the section about several machines."""
    text = (DOCS / "clusters.md").read_text(encoding="utf-8")
    section = text[text.index("## Several machines") : text.index("## Kubernetes")]
    return [shlex.split(line) for line in re.findall(r"^    (torchrun .*)$", section, re.MULTILINE)]


def _here(command: list[str], port: int, *overrides: str) -> list[str]:
    """A documented command with one process, on this machine, for a small training."""
    place = {"--master-addr": "localhost", "--master-port": str(port), "--nproc-per-node": "1"}
    options = command[1 : command.index("train") + 1]
    said = [place.get(before, word) for before, word in zip(["", *options], options, strict=False)]
    return [sys.executable, "-m", "torch.distributed.run", *said, *SMALL, *overrides]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_two_agents_train_what_two_processes_of_one_machine_train(tmp_path: Path) -> None:
    first, second = _documented()
    assert [pair for pair in zip(first, second, strict=True) if len(set(pair)) > 1] == [
        ("0", "1")
    ]  # the machine's number
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    port, run_dir = _free_port(), f"run_dir={tmp_path / 'two'}"
    agents = [
        subprocess.Popen(_here(command, port, run_dir, f"cache_dir={tmp_path}"), env=environment)
        for command in (first, second)
    ]
    assert [agent.wait(200) for agent in agents] == [0, 0]
    place = ["devices=2", f"run_dir={tmp_path / 'one'}", f"cache_dir={tmp_path}"]
    command = [sys.executable, "-m", "harness.cli", "train", *SMALL, *place]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("one", "two")]
    assert [record["world_size"] for record in records] == [2, 2]
    assert records[0]["weights_sha256"] == records[1]["weights_sha256"]


def test_the_job_of_a_cloud_is_the_documented_command() -> None:
    """SkyPilot's file, as it stands in the documentation, starts torchrun with the same options."""
    text = (DOCS / "examples" / "skypilot.yaml").read_text(encoding="utf-8")
    assert text.split("\n", 1)[1] in (DOCS / "clusters.md").read_text(encoding="utf-8")
    task = yaml.safe_load(text)
    (command,) = re.findall(r"torchrun (?:.*\\\n)*.*", task["run"])
    options = [word for word in shlex.split(command, posix=False) if word.startswith("-")]
    assert sorted(set(options) - {"-n", "-m"}) == sorted({word for word in _documented()[0] if word.startswith("--")})
    (mount,) = task["volumes"]
    assert f"runs_dir={mount}" in command
    assert f"ssodbench doctor run_dir={mount}" in task["run"]
