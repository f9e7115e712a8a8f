"""Records survive the way to disk and back, and damaged or newer ones are named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core import record as records
from harness.core.types import RunRecord, UserError

_numbers = st.none() | st.floats(0, 100)


@given(
    ap=_numbers,
    stall=st.none() | st.floats(0, 1),
    percent=st.none() | st.floats(0.01, 100),
    error=st.none() | st.text(),
    resumed=st.lists(st.integers(0, 10**6)),
    config=st.dictionaries(st.text(), st.none() | st.integers(-(2**53), 2**53) | st.text() | st.lists(st.booleans())),
)
def test_round_trip(tmp_path_factory, ap, stall, percent, error, resumed, config):
    path = tmp_path_factory.mktemp("run") / "sub folder" / "record.json"
    record = RunRecord(
        status="ok", ap=ap, data_stall=stall, percent=percent, error=error, resumed_from=resumed, config=config
    )
    records.write_record(path, record)
    assert records.read_record(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]  # no temporary file stays


def test_numbers_stay_numbers(tmp_path):
    records.write_record(tmp_path / "record.json", RunRecord(ap=12.3456789012345, status="ok"))
    assert json.loads((tmp_path / "record.json").read_text())["ap"] == 12.3456789012345


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b'{"schema_version": 1, "ap": 1', "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[1, 2]", "not a run record"),
        (b'{"ap": 1}', "not a run record"),
        (b'{"schema_version": "1"}', "not a run record"),
        (b'{"schema_version": 9}', "schema 9"),
        (b'{"schema_version": 1, "flavour": 1}', "unknown key 'flavour'"),
        (b'{"schema_version": 1, "ap": "12.3"}', "damaged"),
        (b'{"schema_version": 1, "status": "fine"}', "status is 'fine'"),
        (b'{"schema_version": 1, "status": "ok"}', "the key suite is missing"),
        (b'{"schema_version": 1, "status": "ok", "fold": -1}', "the key suite"),
        (b'{"schema_version": 1, "config": ' + b"[" * 60 + b"]" * 60 + b"}", "nested more than 50"),
        (b'{"schema_version": 1, "config": ' + b"[" * 9999 + b"]" * 9999 + b"}", "nested too deeply"),
        (b'{"schema_version": 1, "environment": {"gpus": "A100"}}', "gpus: Expected `array|null`"),
    ],
)
def test_bad_records_are_named(tmp_path, content, words):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        records.read_record(path)
    assert str(path) in str(caught.value)


def test_scores_out_of_range_are_named(tmp_path):
    path = tmp_path / "record.json"
    records.write_record(path, RunRecord(status="ok", scores={"student": {"ap": 101.0}}))
    with pytest.raises(UserError, match=r"scores\.student\.ap is 101\.0, not within 0 to 100"):
        records.read_record(path)


def test_schema_1_is_migrated(tmp_path):
    """Its scores of `student` and `teacher` stood side by side; a run without a teacher has none of it."""
    old = Path(__file__).parents[2] / "data" / "schema1" / "records"
    for file in old.glob("*.json"):
        raw, record = json.loads(file.read_text()), records.read_record(file)
        networks = ["student", "teacher"] if raw["teacher_ap"] is not None else ["student"]
        assert list(record.scores) == networks
        for name in networks:
            assert record.scores[name] == {
                m: raw[f"{name}_{m}"] for m in ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
            }
        records.write_record(tmp_path / file.name, record)
        assert records.read_record(tmp_path / file.name) == record
        assert json.loads((tmp_path / file.name).read_text())["schema_version"] == 2


def test_missing_record(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        records.read_record(tmp_path / "record.json")


def test_failed_write_keeps_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    records.write_record(path, RunRecord(status="ok", ap=1.0))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.write_record(path, RunRecord(status="ok", ap=2.0))
    assert records.read_record(path).ap == 1.0
    assert list(tmp_path.iterdir()) == [path]


def test_environment_is_json_and_names_the_machine():
    found = json.loads(json.dumps(records.environment()))
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "torchvision", "numpy"} <= set(found["packages"])
    assert found["cores"] >= 1
    assert found["cpu"]


def test_commit_agrees_with_git():
    folder = Path(records.__file__).parent
    git = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        assert records.code_commit() is None
    else:
        assert records.code_commit().removesuffix("-dirty") == git.stdout.strip()


def test_no_commit_from_somebody_elses_repository(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "record.py").write_text("")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "record.py"))
    assert records.code_commit() is None
