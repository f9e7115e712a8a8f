"""What the files at the top of the repository say of the project agrees with each other."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import harness

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert harness.__version__ == PROJECT["version"] == citation["version"]
    told = subprocess.run([sys.executable, "-m", "harness", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"ssodbench {harness.__version__}\n"


def test_one_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"
    # Of https://www.apache.org/licenses/LICENSE-2.0.txt.
    published = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == published


def test_every_dependency_is_pinned() -> None:
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    installed = [
        *PROJECT["dependencies"],
        *(PROJECT["optional-dependencies"][extra] for extra in ("cu13", "test", "docs")),
    ]
    wanted = [line for part in installed for line in ([part] if isinstance(part, str) else part)]
    assert {re.match(r"[\w.-]+", line)[0].lower() for line in wanted} <= names  # type: ignore[index]


def test_hooks_run_what_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("lint: ")[1].split("\n\n")[0]
    tools = {line.split("/")[1].split(" ")[0] for line in lint.splitlines() if "$(BIN)/" in line}
    assert {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks} == tools
