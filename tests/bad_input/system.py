"""What the system refuses: read-only, full, forbidden, too long, looping, without locks, of the wrong kind, gone."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.core.types import RunRecord
from tests.bad_input.case import Case
from tests.bad_input.refusals import (
    all_of,
    deleted_working_folder,
    device,
    fifo,
    file,
    folder,
    full,
    loop,
    no_locks,
    refusing,
)

PETS = "data=custom data.root={pets} device=cpu schedule=smoke detector.weights=scratch"
TRAIN = f"train {PETS} run_dir={{tmp}}/run"
PREPARE = f"prepare {PETS} cache_dir={{tmp}}/cache"
SUITE = f"suite suite=smoke {PETS} suite.methods=[supervised] suite.percents=[50] runs_dir={{tmp}}/runs"
REPORT = "report runs_dir={tmp}/runs"
EVALUATE = "evaluate run_dir={tmp}/run device=cpu"
PROFILE = f"profile {PETS} profile.pipelines=[torchvision] out={{tmp}}/speed.json"
CONFIG = "config"

LONG = "n" * 300
RO, FULL, NO, IO = (os.strerror(code) for code in (errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EIO))
LOOP, NAME, GONE = os.strerror(errno.ELOOP), os.strerror(errno.ENAMETOOLONG), "working folder has been deleted"
KIND = "Not a regular file"


def _record(tmp: Path) -> None:
    (tmp / "runs/one").mkdir(parents=True)
    record = RunRecord(status="ok", cell="one", method="supervised", percent=10.0, ap=1.0)
    (tmp / "runs/one/record.json").write_bytes(msgspec.json.encode(record))


def _run(tmp: Path) -> None:
    (tmp / "run").mkdir()
    (tmp / "run/config.yaml").write_text("data: {}\n")


def _own_data(tmp: Path) -> None:
    for name in ("train", "val"):
        (tmp / "own" / name).mkdir(parents=True)
        (tmp / "own" / f"{name}.json").write_text("{}")


def _instead(name: str, put: Any) -> Any:
    def make(tmp: Path) -> None:
        _own_data(tmp)
        (tmp / name).unlink()
        put(name)(tmp)

    return make


class _Full:
    """A standard output on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, FULL)

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, FULL)

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)


def _output_full(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(sys, "stdout", _Full())


def _output_closed(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(sys, "stdout", None)


def _no_home(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("SSODBENCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def _no_shared_memory(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", refused)


def _little_shared_memory(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage())


class _Usage:
    free = 1 << 16


OWN = "prepare data=custom data.root={tmp}/own cache_dir={tmp}/cache"
WORKERS = f"{TRAIN} pipeline=torchvision pipeline.threads=1 cache_dir={{tmp}}/cache"

CASES = [
    # A working folder that has been deleted
    *(
        Case(f"{command.split()[0]}: working folder deleted", command, (GONE, "cd DIR"), patch=deleted_working_folder)
        for command in (PREPARE, TRAIN, SUITE, REPORT, EVALUATE, PROFILE, CONFIG)
    ),
    # The output
    Case("config: output closed", CONFIG, ("standard output", "send it to a file"), patch=_output_closed, code=1),
    Case("config: output full", CONFIG, ("output", FULL), patch=_output_full, code=1),
    # The run folder of train
    Case("train: run folder read-only", TRAIN, ("{tmp}/run", RO, "run_dir="), patch=refusing("run", errno.EROFS)),
    Case("train: run folder forbidden", TRAIN, ("{tmp}/run", NO, "run_dir="), patch=refusing("run", errno.EACCES)),
    Case("train: run folder full", TRAIN, ("run", FULL, "free space"), patch=refusing("run", errno.ENOSPC), code=1),
    Case("train: run folder over quota", TRAIN, ("run", "quota"), patch=refusing("run", errno.EDQUOT), code=1),
    Case("train: run folder fails", TRAIN, ("{tmp}/run", IO), patch=refusing("run", errno.EIO), code=1),
    Case("train: too many open files", TRAIN, "ulimit -n", patch=refusing("run", errno.EMFILE), code=1),
    Case("train: run folder without locks", TRAIN, ("{tmp}/run", "no locks", "run_dir="), patch=no_locks(errno.ENOLCK)),
    Case("train: locks not implemented", TRAIN, ("no locks", "local disk"), patch=no_locks(errno.ENOSYS)),
    Case("train: locks not supported", TRAIN, ("no locks", "local disk"), patch=no_locks(errno.EOPNOTSUPP)),
    Case("train: run folder is a file", TRAIN, ("{tmp}/run", "run_dir="), file("run")),
    Case("train: a file above the run folder", f"{TRAIN}/deeper", ("{tmp}/run/deeper", "run_dir="), file("run")),
    Case("train: run folder loops", TRAIN, ("{tmp}/run", "run_dir="), loop("run")),
    Case("train: run folder too long", f"{TRAIN}/{LONG}", (LONG, NAME, "shorter", "run_dir=")),
    Case("train: lock is a FIFO", TRAIN, ("{tmp}/run/lock", KIND), fifo("run/lock")),
    Case("train: lock is a device", TRAIN, ("{tmp}/run/lock", KIND), device("run/lock")),
    Case("train: lock is a folder", TRAIN, ("{tmp}/run/lock", "run_dir="), folder("run/lock")),
    Case("train: record is a FIFO", TRAIN, ("{tmp}/run/record.json", KIND), fifo("run/record.json")),
    Case("train: record is a device", TRAIN, ("{tmp}/run/record.json", KIND), device("run/record.json")),
    Case("train: record is a folder", TRAIN, "{tmp}/run/record.json", folder("run/record.json")),
    Case("train: runs folder is a file", f"train {PETS} runs_dir={{tmp}}/runs", "runs", file("runs")),
    # The cache
    Case("prepare: cache read-only", PREPARE, ("cache", RO, "cache_dir="), patch=refusing("cache", errno.EROFS)),
    Case("prepare: cache forbidden", PREPARE, ("cache", NO, "cache_dir="), patch=refusing("cache", errno.EACCES)),
    Case("prepare: cache full", PREPARE, (FULL, "free space"), patch=refusing("cache", errno.ENOSPC), code=1),
    Case("prepare: cache fails", PREPARE, ("cache", IO), patch=refusing("cache", errno.EIO), code=1),
    Case("prepare: cache without locks", PREPARE, ("no locks", "cache_dir="), patch=no_locks(errno.ENOLCK)),
    Case("prepare: cache locks missing", PREPARE, ("no locks", "cache_dir="), patch=no_locks(errno.ENOSYS)),
    Case("prepare: cache is a file", PREPARE, ("{tmp}/cache", "cache_dir="), file("cache")),
    Case("prepare: cache loops", PREPARE, ("{tmp}/cache", "cache_dir="), loop("cache")),
    Case("prepare: cache too long", f"{PREPARE}/{LONG}", (LONG, NAME, "cache_dir=")),
    Case(
        "train: cache read-only", f"{TRAIN} cache_dir={{tmp}}/c", (RO, "cache_dir="), patch=refusing("c", errno.EROFS)
    ),
    Case(
        "train: cache full",
        f"{TRAIN} cache_dir={{tmp}}/c",
        (FULL, "free space"),
        patch=refusing("c", errno.ENOSPC),
        code=1,
    ),
    Case(
        "suite: cache forbidden",
        f"{SUITE} cache_dir={{tmp}}/c",
        ("{tmp}/c", NO, "cache_dir="),
        patch=refusing("c", errno.EACCES),
    ),
    Case(
        "profile: cache read-only",
        f"{PROFILE} cache_dir={{tmp}}/c",
        ("{tmp}/c", RO, "cache_dir="),
        patch=refusing("c", errno.EROFS),
    ),
    # The export of prepare
    Case("prepare: export is a file", f"{PREPARE} export_dir={{tmp}}/e", "export_dir={tmp}/e", file("e")),
    Case(
        "prepare: export read-only",
        f"{PREPARE} export_dir={{tmp}}/e",
        ("{tmp}/e", RO, "export_dir"),
        patch=refusing("e", errno.EROFS),
    ),
    Case("prepare: export loops", f"{PREPARE} export_dir={{tmp}}/e", ("{tmp}/e", "export_dir"), loop("e")),
    # The data
    Case("prepare: data missing", f"{OWN}", ("{tmp}/own", "data.root")),
    Case("prepare: data loops", f"{OWN}", ("{tmp}/own", "data.root"), loop("own")),
    Case("prepare: data is a file", f"{OWN}", ("{tmp}/own", "data.root"), file("own")),
    Case("prepare: annotations are a FIFO", OWN, ("own/train.json", KIND), _instead("own/train.json", fifo)),
    Case("prepare: annotations are a device", OWN, ("own/train.json", KIND), _instead("own/train.json", device)),
    Case("prepare: annotations are a folder", OWN, "own/train.json", _instead("own/train.json", folder)),
    Case("prepare: annotations loop", OWN, "own/train.json", _instead("own/train.json", loop)),
    Case(
        "prepare: annotations forbidden",
        OWN,
        ("own/train.json", NO),
        _own_data,
        patch=refusing("own/train.json", errno.EACCES, reads=True),
    ),
    Case(
        "train: annotations fail",
        f"{TRAIN} data.root={{tmp}}/own",
        ("own/train.json", IO),
        _own_data,
        patch=refusing("own/train.json", errno.EIO, reads=True),
    ),
    Case(
        "train: index file is a FIFO",
        f"{TRAIN} split.protocol=ids split.index_file={{tmp}}/ids.json",
        ("split.index_file={tmp}/ids.json", KIND),
        fifo("ids.json"),
    ),
    Case(
        "train: index file is a device",
        f"{TRAIN} split.protocol=ids split.index_file={{tmp}}/ids.txt",
        ("split.index_file={tmp}/ids.txt", KIND),
        device("ids.txt"),
    ),
    Case(
        "train: index file loops",
        f"{TRAIN} split.protocol=ids split.index_file={{tmp}}/ids.json",
        ("split.index_file={tmp}/ids.json", LOOP),
        loop("ids.json"),
    ),
    # Suites
    Case("suite: folder read-only", SUITE, ("runs/smoke", RO, "runs_dir"), patch=refusing("runs", errno.EROFS)),
    Case("suite: folder forbidden", SUITE, ("runs/smoke", NO, "runs_dir"), patch=refusing("runs", errno.EACCES)),
    Case("suite: folder full", SUITE, ("runs/smoke", FULL), patch=refusing("runs", errno.ENOSPC), code=1),
    Case("suite: folder without locks", SUITE, ("runs/smoke", "no locks"), patch=no_locks(errno.ENOLCK)),
    Case("suite: folder is a file", SUITE, ("{tmp}/runs", "runs_dir"), file("runs")),
    Case("suite: folder loops", SUITE, ("{tmp}/runs", "runs_dir"), loop("runs")),
    Case("suite: folder too long", f"{SUITE}/{LONG}", (LONG, NAME, "runs_dir")),
    Case("suite: no data", f"{SUITE} data.root={{tmp}}/own", ("{tmp}/own", "data.root")),
    Case("suite: a ratio without an image", f"{SUITE} suite.percents=[0.1]", ("0.1", "suite.percents")),
    Case(
        "suite: nothing unlabelled",
        f"{SUITE} suite.methods=[soft_teacher] suite.percents=[100]",
        ("soft_teacher", "suite.methods"),
    ),
    Case(
        "suite: a ratio that the index file lacks",
        f"{SUITE} split.protocol=unbiased_teacher split.index_file={{tmp}}/index.json",
        ("split.percent=50", "suite.percents"),
        lambda tmp: (tmp / "index.json").write_text('{"10": {"1": [0, 1]}}'),
    ),
    Case(
        "suite: a fold that the index file lacks",
        f"{SUITE} split.protocol=unbiased_teacher split.index_file={{tmp}}/index.json suite.folds=[3]",
        ("split.fold=3", "suite.folds"),
        lambda tmp: (tmp / "index.json").write_text('{"50": {"1": [0, 1]}}'),
    ),
    Case("suite: no index file", f"{SUITE} split.protocol=unbiased_teacher", "split.index_file"),
    # Reports
    Case("report: no folder", REPORT, ("{tmp}/runs", "runs_dir=DIR")),
    Case("report: folder loops", REPORT, ("{tmp}/runs", LOOP, "runs_dir=DIR"), loop("runs")),
    Case("report: folder is a file", REPORT, ("{tmp}/runs", "runs_dir=DIR"), file("runs")),
    Case("report: record is a FIFO", REPORT, ("runs/one/record.json", KIND), fifo("runs/one/record.json")),
    Case("report: record is a device", REPORT, ("runs/one/record.json", KIND), device("runs/one/record.json")),
    Case(
        "report: record forbidden",
        REPORT,
        ("runs/one/record.json", NO),
        _record,
        patch=refusing("runs/one/record.json", errno.EACCES, reads=True),
    ),
    Case("report: out is a file", f"{REPORT} out={{tmp}}/out", ("out={tmp}/out", "out"), all_of(_record, file("out"))),
    Case(
        "report: out is below a file",
        f"{REPORT} out={{tmp}}/out/x",
        "out={tmp}/out/x",
        all_of(_record, file("out")),
    ),
    Case("report: out loops", f"{REPORT} out={{tmp}}/out", ("out={tmp}/out", LOOP), all_of(_record, loop("out"))),
    Case("report: out too long", f"{REPORT} out={{tmp}}/{LONG}", (LONG, NAME), _record),
    Case(
        "report: out read-only",
        f"{REPORT} out={{tmp}}/out",
        ("out={tmp}/out", "cannot be written"),
        all_of(_record, folder("out")),
        patch=refusing("out", errno.EROFS),
    ),
    Case(
        "report: out full",
        f"{REPORT} out={{tmp}}/out",
        ("{tmp}/out/report.html", FULL, "free space"),
        _record,
        patch=full("out"),
        code=1,
    ),
    Case("report: a page is a FIFO", REPORT, ("report.html", KIND), all_of(_record, fifo("runs/report/report.html"))),
    # Evaluations
    Case("evaluate: no run", EVALUATE, ("{tmp}/run", "run_dir")),
    Case("evaluate: run folder loops", EVALUATE, ("{tmp}/run", LOOP, "run_dir"), loop("run")),
    Case("evaluate: run folder is a file", EVALUATE, ("{tmp}/run", "run_dir"), file("run")),
    Case("evaluate: configuration is a FIFO", EVALUATE, ("run/config.yaml", KIND), fifo("run/config.yaml")),
    Case("evaluate: configuration is a device", EVALUATE, ("run/config.yaml", KIND), device("run/config.yaml")),
    Case("evaluate: configuration is a folder", EVALUATE, "run/config.yaml", folder("run/config.yaml")),
    Case(
        "evaluate: configuration forbidden",
        EVALUATE,
        ("{tmp}/run", "config.yaml", NO),
        _run,
        patch=refusing("run/config.yaml", errno.EACCES, reads=True),
    ),
    Case("evaluate: run folder too long", f"evaluate run_dir={{tmp}}/{LONG}", (LONG, NAME)),
    Case("evaluate: out is a folder", f"{EVALUATE} out={{tmp}}/out", "out={tmp}/out", all_of(_run, folder("out"))),
    Case("evaluate: out loops", f"{EVALUATE} out={{tmp}}/out", ("out={tmp}/out", LOOP), all_of(_run, loop("out"))),
    Case("evaluate: out is a device", f"{EVALUATE} out=/dev/null", "out=/dev/null", _run),
    Case("evaluate: out is a FIFO", f"{EVALUATE} out={{tmp}}/out", "out={tmp}/out", all_of(_run, fifo("out"))),
    Case(
        "evaluate: run folder read-only",
        EVALUATE,
        ("{tmp}/run", "out"),
        _run,
        patch=refusing("run", errno.EROFS),
    ),
    # Profiles
    Case("profile: out is a folder", PROFILE, "out={tmp}/speed.json", folder("speed.json")),
    Case("profile: out is below a file", f"{PROFILE}/x", "out={tmp}/speed.json/x", file("speed.json")),
    Case("profile: out is a device", f"{PROFILE} out=/dev/full", "out=/dev/full"),
    Case("profile: out too long", f"{PROFILE}{LONG}", (LONG, NAME)),
    # Configurations
    Case("config: own folder missing", f"{CONFIG} --config-dir {{tmp}}/conf", "--config-dir {tmp}/conf"),
    Case("config: own folder loops", f"{CONFIG} --config-dir {{tmp}}/conf", ("{tmp}/conf", LOOP), loop("conf")),
    Case(
        "config: own folder is a file", f"{CONFIG} --config-dir {{tmp}}/conf", "--config-dir {tmp}/conf", file("conf")
    ),
    Case("config: own folder of nobody", f"{CONFIG} --config-dir=~nobody-here/conf", ("--config-dir", "nobody-here")),
    Case(
        "config: home of nobody", f"{CONFIG} cache_dir=~nobody-here/c", ("cache_dir=~nobody-here", "there is no user")
    ),
    Case("train: home of nobody", f"{TRAIN} runs_dir=~nobody-here", ("runs_dir=~nobody-here", "there is no user")),
    Case("config: no home", CONFIG, ("cache_dir", "HOME"), patch=_no_home),
    Case("config: a name that is no text", [CONFIG, "out=x\udce4"], ("out=", "UTF-8")),
    # Shared memory
    Case(
        "train: no semaphores",
        WORKERS,
        ("/dev/shm", "pipeline.threads=1", "pipeline.threads=0"),
        patch=_no_shared_memory,
    ),
    Case(
        "train: little shared memory",
        f"{WORKERS} batch.labeled=16",
        ("/dev/shm", "pipeline.threads=1", "--shm-size"),
        patch=_little_shared_memory,
    ),
]
