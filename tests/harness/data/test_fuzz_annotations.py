"""Annotation files with a mistake at a random place: `prepare` describes them or says in one sentence what is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from harness.commands import prepare
from harness.config import compose
from harness.core.types import UserError
from tests.bad_input.conftest import make_pets

pytestmark = pytest.mark.timeout(120)

Key = str | int

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        "3",
        "001.jpg",
        "../001.jpg",
        "a\0b",
        "a\nb",
        "\ud800",
        "\udc80",
        "[x]",
        "\u202e",
        "é" * 300,
    ),
    *(0, -1, 1, 3, 2**31, 2**53, 2**53 + 1, 2**63, -(2**63), 2**64, 10**400, 0.5, 1.0, -0.0, 1e-320, 1e300, -1e300),
    *(float("nan"), float("inf"), float("-inf"), [], {}, [1], [1, 2, 3, 4], [[]], {"id": 1}, [None] * 4),
]


@st.composite
def mutated(draw: st.DrawFn, healthy: Any) -> Any:
    """The content with one to three values replaced, removed or repeated."""
    content = copy.deepcopy(healthy)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if action == "replace":
            parent[key] = draw(st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=9))
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[f"{key} "] = parent[key]
    return content


def _places(node: Any) -> list[tuple[Any, Key]]:
    """Every (container, key) of JSON data."""
    keys: list[Key] = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    return [(node, key) for key in keys] + [place for key in keys for place in _places(node[key])]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    root = tmp_path_factory.mktemp("fuzz")
    make_pets(root)
    own = [f"data.root={root}", f"cache_dir={root}/cache", "split.percent=50", "prepare.percents=[50]"]
    return compose.load(["data=custom", *own, "prepare.folds=[1]"])


@pytest.fixture(scope="module")
def healthy(cfg: DictConfig) -> bytes:
    return (Path(cfg.data.root) / "train.json").read_bytes()


def ends_well(cfg: DictConfig, content: bytes) -> None:
    (Path(cfg.data.root) / "train.json").write_bytes(content)
    told = ""
    try:
        prepare.describe(cfg)
    except UserError as error:
        told = str(error)
    assert "\n" not in told, told
    assert len(told) < 2000, told


QUIET = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("error")
@QUIET
@given(data=st.data())
def test_values_at_random_places(cfg: DictConfig, healthy: bytes, data: st.DataObject) -> None:
    content = data.draw(mutated(json.loads(healthy)))
    ends_well(cfg, json.dumps(content).encode())


@pytest.mark.filterwarnings("error")
@QUIET
@given(data=st.data())
def test_bytes_at_random_places(cfg: DictConfig, healthy: bytes, data: st.DataObject) -> None:
    content = bytearray(healthy)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        content[start:end] = data.draw(
            st.binary(max_size=6) | st.sampled_from([b"", b"]", b"}", b'"', b"NaN", b"9" * 30])
        )
    ends_well(cfg, bytes(content))


@pytest.mark.parametrize("name", ["train.json", "val.json"])
def test_healthy_file_is_described(cfg: DictConfig, healthy: bytes, name: str) -> None:
    """The other tests here would pass if nothing were ever read."""
    (Path(cfg.data.root) / "train.json").write_bytes(healthy)
    found = prepare.describe(cfg)
    assert found["parts"][name.removesuffix(".json")]["boxes"] == (16 if name == "train.json" else 4)
