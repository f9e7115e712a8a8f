"""A suite with a stand-in for `train`: order, dependencies, resuming, failures, signals, and what is refused."""

import copy
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from harness.config import compose
from harness.config.identity import config_sha256, identity
from harness.core.lock import RunLock
from harness.core.record import read_record
from harness.core.types import UserError
from harness.suite import cells as jobs
from harness.suite import plan, suite
from harness.suite.claims import Claims

pytestmark = pytest.mark.timeout(120)

# Writes a record as `train` would; `plan.json` says how each cell behaves, `events` lists what was started.
FAKE_TRAIN = """
import json, os, signal, sys, time
state = sys.argv[1]
given = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
folder = given["run_dir"]
cell = os.path.basename(folder)
plan = json.load(open(os.path.join(state, "plan.json")))
kind = plan["behaviour"].get(cell, "ok")
def tell(word):
    with open(os.path.join(state, "events"), "a") as file:
        file.write(json.dumps([word, cell, sys.argv[2:], os.environ["OMP_NUM_THREADS"], os.getppid()]) + "\\n")
record = {"schema_version": 1, "status": "ok", "cell": cell, "suite": os.environ["SSODBENCH_SUITE"], "ap": 50.0,
          "method": given["method"], "percent": float(given["split.percent"]), "fold": int(given["split.fold"]),
          "seed": int(given["seed"]), "dataset": "shapes", "protocol": "soft_teacher", "steps": 6,
          "config_sha256": plan["sha256"][cell], "config": plan["config"][cell], "score_threshold": 0.05}
record |= dict.fromkeys(("preset", "detector", "dataset_sha256", "val_sha256", "split_sha256"), "")
def write(**changes):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "record.json"), "w") as file:
        json.dump(record | changes, file)
def stop(*_):
    if kind != "early":
        write(status="interrupted", ap=None, error="interrupted by SIGTERM")
    tell("stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
tell("start")
if kind == "crash":
    write(status="running", ap=None)
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "mistake":
    print("ssodbench: the images are missing: set data.root=DIR", file=sys.stderr)
    sys.exit(2)
if kind == "fail":
    write(status="failed", ap=None, error="RunError: the loss is not finite at step 3")
    print("some words\\nbefore the end", file=sys.stderr)
    sys.exit(1)
time.sleep(60 if kind in ("slow", "early") else 0.5 if kind == "brief" else 0.05)
write()
tell("end")
"""


_load, prepare = compose.load, suite.prepare
_loaded = {}


def load_once(overrides, config_dirs=()):
    """`config.load`, composing each configuration once for all tests."""
    key = (*overrides, *config_dirs)
    if key not in _loaded:
        _loaded[key] = _load(overrides, config_dirs)
    return copy.deepcopy(_loaded[key])


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs a suite with the stand-in; gives its exit code, and keeps what was started and printed."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state/events").touch()
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(FAKE_TRAIN))
    monkeypatch.setattr(jobs, "train_command", lambda: [sys.executable, str(script), str(tmp_path / "state")])
    monkeypatch.setattr(suite, "fork_server", lambda *_: None)
    monkeypatch.setattr(compose, "load", load_once)
    monkeypatch.setattr("harness.report.plots.draw", lambda *_: {})
    monkeypatch.chdir(tmp_path)
    prepared = []
    monkeypatch.setattr(suite, "prepare", lambda cfg, _: prepared.append(cfg))
    make_plan, asked = plan.plan, {}
    monkeypatch.setattr(suite, "plan", lambda cfg: note(make_plan(cfg)))

    def note(cells):
        plan = {
            "behaviour": asked,
            "sha256": {cell.name: config_sha256(cell.cfg) for cell in cells},
            "config": {cell.name: identity(cell.cfg) for cell in cells},
        }
        (tmp_path / "state/plan.json").write_text(json.dumps(plan))
        return cells

    runs = Path("runs with = and spaces")

    def run(*overrides, behaviour=None, jobs_side_by_side=2, keep_events=False):
        if not keep_events:
            (tmp_path / "state/events").write_text("")
        own = [f"runs_dir={runs}", f"suite.jobs={jobs_side_by_side}"]
        cfg = compose.load(["suite=smoke", *own, *overrides])
        asked.clear()
        asked.update(behaviour or {})
        return suite.run(cfg)

    def events(word=None):
        found = [json.loads(line) for line in (tmp_path / "state/events").read_text().splitlines()]
        return [event for event in found if word in (None, event[0])]

    folder = runs / "smoke"
    return SimpleNamespace(
        run=run,
        events=events,
        folder=folder,
        state=tmp_path / "state",
        prepared=prepared,
        started=lambda: [cell for _, cell, *_ in events("start")],
        states=lambda: {c["name"]: c["state"] for c in json.loads((folder / "suite.json").read_text())["cells"]},
        printed=lambda: capsys.readouterr().out,
    )


def cell(method, percent, fold=1):
    return f"shapes_{method}_soft_teacher-{percent}pct-fold{fold}_seed{fold}"


def test_the_whole_suite(bench):
    assert bench.run("schedule.steps=7") == 0
    assert sorted(bench.started()) == sorted(
        cell(method, percent) for method in ("supervised", "stac", "soft_teacher") for percent in (1, 5, 10)
    )
    order = [(word, name) for word, name, *_ in bench.events()]
    for percent in (1, 5, 10):
        ended, started = (
            order.index(("end", cell("supervised", percent))),
            order.index(("start", cell("stac", percent))),
        )
        assert ended < started
    running = 0
    for word, _ in order:
        running += 1 if word == "start" else -1
        assert running <= 2
    for _, name, arguments, threads, _ in bench.events("start"):
        assert threads == "1"
        assert "schedule.steps=7" in arguments  # what the user said reaches every cell
        stage1 = [word for word in arguments if word.startswith("method.offline.checkpoint=")]
        percent = name.split("-")[1].removesuffix("pct")
        expected = [f"method.offline.checkpoint={bench.folder / cell('supervised', percent)}"] if "stac" in name else []
        assert stage1 == expected
    assert len(bench.prepared) == 1
    printed = bench.printed()
    assert "50.0 (n=1)" in printed
    assert "report.html" in printed
    assert (bench.folder / "report/report.html").exists()
    assert set(bench.states().values()) == {"ok"}


def test_baselines_start_first(bench):
    bench.run(jobs_side_by_side=1)
    assert [name.split("_")[1] for name in bench.started()[:3]] == ["supervised"] * 3


def test_a_finished_suite_runs_nothing(bench):
    bench.run()
    assert bench.run() == 0
    assert bench.started() == []
    assert len(bench.prepared) == 1
    assert "0 to run" in bench.printed()


def test_missing_and_failed_cells_are_run_again(bench):
    assert bench.run(behaviour={cell("soft_teacher", 5): "fail"}) == 1
    (bench.folder / cell("supervised", 10) / "record.json").unlink()
    assert bench.run() == 0
    assert sorted(bench.started()) == sorted([cell("soft_teacher", 5), cell("supervised", 10)])


def test_a_failed_first_stage(bench):
    assert bench.run(behaviour={cell("supervised", 1): "fail"}) == 1
    states = bench.states()
    assert states[cell("supervised", 1)] == "failed"
    assert states[cell("stac", 1)] == "skipped"
    assert sorted(states.values()) == sorted(["failed", "skipped", *["ok"] * 7])
    printed = bench.printed()
    assert "before the end" in printed  # the end of what it said
    assert "the loss is not finite at step 3" in printed
    report = (bench.folder / "report/report.md").read_text()
    assert f"{cell('stac', 1)}: skipped: its first stage {cell('supervised', 1)} failed" in report
    assert bench.run() == 0
    assert bench.started() == [cell("supervised", 1), cell("stac", 1)]


def test_a_mistake_and_a_killed_cell_have_a_reason(bench):
    assert bench.run(behaviour={cell("soft_teacher", 1): "mistake", cell("soft_teacher", 5): "crash"}) == 1
    reasons = {c["name"]: c["reason"] for c in json.loads((bench.folder / "suite.json").read_text())["cells"]}
    assert "the images are missing" in reasons[cell("soft_teacher", 1)]
    assert "SIGKILL" in reasons[cell("soft_teacher", 5)]
    record = read_record(bench.folder / cell("soft_teacher", 5) / "record.json")
    assert record.status == "failed"
    assert "SIGKILL" in record.error
    assert "the images are missing" in (bench.folder / "report/report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_cells_in_order(bench, number):
    slow = {cell("supervised", 1): "slow", cell("supervised", 5): "slow", cell("supervised", 10): "slow"}

    def interrupt():
        while len(bench.events("start")) < 2:
            time.sleep(0.05)
        time.sleep(0.3)  # until both have their handler
        os.kill(os.getpid(), number)
        if number == signal.SIGHUP:
            time.sleep(0.05)
            os.kill(os.getpid(), number)  # the shell of a closed terminal sends its own

    threading.Thread(target=interrupt).start()
    assert bench.run(behaviour=slow) == 128 + number
    assert len(bench.events("stopped")) == 2
    assert sorted(bench.states().values()) == ["interrupted"] * 2 + ["waiting"] * 7
    assert "interrupted by SIGTERM" in (bench.folder / "report/report.md").read_text()
    assert bench.run() == 0
    assert len(bench.started()) == 9


def test_a_signal_before_any_cell_has_a_record(bench):
    def interrupt():
        while not bench.events("start"):
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    one = ("suite.methods=[supervised]", "suite.percents=[1]")
    assert bench.run(*one, behaviour={cell("supervised", 1): "early"}) == 143
    assert bench.run(*one) == 0


def beside(bench, count, *overrides, behaviour=None):
    """Runs a suite in several processes at once; gives their exit codes."""

    def one():
        sys.exit(bench.run(*overrides, behaviour=behaviour, keep_events=True))

    (bench.state / "events").write_text("")
    processes = [multiprocessing.get_context("fork").Process(target=one) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_processes_that_share_a_folder_run_each_cell_once(bench):
    brief = {cell(m, p): "brief" for m in ("supervised", "stac", "soft_teacher") for p in (1, 5, 10)}
    assert beside(bench, 3, behaviour=brief) == [0, 0, 0]
    assert len(bench.started()) == 9
    assert len(set(bench.started())) == 9
    assert len({parent for *_, parent in bench.events("start")}) > 1  # not one process did it all
    assert set(bench.states().values()) == {"ok"}


def test_a_cell_that_fails_in_one_process_is_not_tried_by_the_others(bench):
    first = {cell("supervised", 1): "fail"}
    assert beside(bench, 3, behaviour=first) == [1, 1, 1]
    assert sorted(bench.started()).count(cell("supervised", 1)) == 1
    assert bench.states()[cell("stac", 1)] == "skipped"


ONE = ("suite.methods=[supervised]", "suite.percents=[1]")


def test_cells_of_another_process_are_left_to_it(bench):
    claims = Claims(bench.folder)
    assert claims.take(cell("supervised", 1), bench.folder / cell("supervised", 1))
    assert bench.run(*ONE, "suite.wait=false") == 3
    assert bench.started() == []
    assert bench.states() == {cell("supervised", 1): "held"}
    assert f"run by process {os.getpid()}" in (bench.folder / "suite.json").read_text()
    threading.Timer(0.5, claims.release, [cell("supervised", 1)]).start()
    assert bench.run(*ONE) == 0  # waits, and finds that the other one has not finished it
    assert bench.started() == [cell("supervised", 1)]


def test_a_killed_process_holds_nothing(bench):
    code = f"""
import os, signal
from pathlib import Path
from harness.suite.claims import Claims
assert Claims(Path({str(bench.folder)!r})).take({cell("supervised", 1)!r}, Path("x"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert bench.run(*ONE) == 0
    assert len(bench.started()) == 1


def test_a_run_that_outlives_its_suite_is_left_alone(bench):
    lock = RunLock(bench.folder / cell("supervised", 1)).acquire()
    assert bench.run(*ONE, "suite.wait=false") == 3
    assert bench.started() == []
    lock.release()
    assert bench.run(*ONE) == 0


def test_status_runs_nothing(bench):
    assert bench.run("suite.status=true") == 0
    assert not bench.folder.exists()
    assert "9 waiting" in bench.printed()
    bench.run(behaviour={cell("supervised", 1): "fail", cell("soft_teacher", 5): "crash"})
    (bench.folder / cell("supervised", 10) / "record.json").unlink()
    claims = Claims(bench.folder)
    assert claims.take(cell("supervised", 10), bench.folder / cell("supervised", 10))
    before = bench.started()
    bench.printed()
    assert bench.run("suite.status=true") == 0
    printed = bench.printed()
    assert bench.started() == []
    assert len(before) == 8
    for words in ("2 failed", "1 running", "1 waiting", "5 ok", "50.0", f"process {os.getpid()}", "SIGKILL"):
        assert words in printed, words


def test_failed_cells_may_be_left_as_they_are(bench):
    bench.run(behaviour={cell("supervised", 1): "fail"})
    assert bench.run("suite.retry_failed=false") == 1
    assert bench.started() == []
    assert bench.states()[cell("supervised", 1)] == "failed"


def test_other_settings_are_not_mixed_in(bench):
    bench.run()
    with pytest.raises(UserError, match=r"schedule\.steps: 6 -> 8.*suite\.name"):
        bench.run("schedule.steps=8")
    assert bench.run("schedule.steps=8", "suite.name=longer") == 0


def test_folds_seeds_and_reference(bench):
    bench.run(
        "suite.folds=[1,2]",
        "suite.seeds=[7,8]",
        "suite.methods=[supervised]",
        "suite.percents=[5]",
        "suite.reference=true",
    )
    names = [f"shapes_supervised_soft_teacher-{p}pct-fold{f}_seed{s}" for p in (5, 100) for f in (1, 2) for s in (7, 8)]
    assert sorted(bench.started()) == sorted(names)


def test_a_method_without_its_first_stage_in_the_suite(bench):
    assert bench.run("suite.methods=[stac]", "suite.percents=[1]") == 0
    assert not any("checkpoint" in word for word in bench.events("start")[0][2])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=stac"], r"method is set by the suite.*suite\.methods"),
        (["split.fold=2"], r"suite\.folds"),
        (["suite.methods=stac"], "must be a list"),
        (["suite.percents=[]"], "must be a list"),
        (["suite.folds=[one]"], r"suite\.folds\[0\]=one"),
        (["suite.methods=[stack]"], "stack"),
        (["suite.percents=[101]"], "at most 100"),
        (["suite.jobs=abc"], r"suite\.jobs=abc must be a whole number"),
        (["suite.jobs=0"], r"suite\.jobs=0 must be a whole number of at least 1"),
        (["suite.jobs=-1"], r"suite\.jobs=-1 must be"),
        (["+suite.cost.soft_teachr=2"], r"suite\.cost\.soft_teachr names no method; did you mean soft_teacher"),
        (['+suite.method_overrides.xyz=["a=b"]'], r"suite\.method_overrides\.xyz names no method: choose of"),
        (["suite.name=null"], r"suite\.name=null must be a name"),
        (["devices=2"], r"2 devices cannot share the 16 images"),
        (["variant=mine"], r"variant is set by the suite.*suite\.variants"),
        (["suite.variants={a: ['split.percent=5']}"], r"suite\.variants\.a sets split\.percent.*say suite\.percents"),
        (["suite.variants={a: ['method=stac']}"], r"suite\.variants\.a sets method.*say suite\.methods"),
        (["suite.variants={a: ['seed=2']}"], r"suite\.variants\.a sets seed.*say suite\.seeds"),
        (["suite.variants={a: ['suite.name=b']}"], r"suite\.variants\.a sets suite\.name, which all cells share"),
        (
            ["suite.variants={a: ['detector.fam=1']}"],
            r"suite\.variants\.a with method=supervised.*detector\.fam is not",
        ),
        (["suite.variants={a: [wide]}"], r"suite\.variants\.a.*'wide' is not of the form key=value"),
        (["suite.variants={a: [], b: ['x=[1]'], a: []}"], r"suite\.variants names a more than once"),
        (
            ["suite.variants={a: []}", "suite.variant_methods={zz: [stac]}"],
            r"suite\.variant_methods\.zz names no variant: choose of a",
        ),
        (
            ["suite.variant_methods={a: [stac]}"],
            r"suite\.variant_methods\.a names no variant: suite\.variants has none",
        ),
        (
            ["suite.variants={wide: []}", "+suite.cost={stac wdie: 2}"],
            r"suite\.cost\.stac wdie names no method; did you mean stac wide",
        ),
        (["suite.variants={../a: []}"], r"suite\.variants=\.\./a must be a name"),
        (["suite.variants={a: [schedule.steps=5]}"], r"put each override in quotes"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(bench, overrides, words):
    with pytest.raises(UserError, match=words):
        bench.run(*overrides)
    assert not bench.folder.exists()


@pytest.mark.parametrize("in_the_way", ["the folder itself", "a parent", "its claims"])
def test_a_folder_that_cannot_be_written(bench, monkeypatch, in_the_way):
    if in_the_way == "its claims":  # as in a folder of another user: it is there, but nothing can be made in it
        bench.folder.mkdir(parents=True)
        (bench.folder / "claims").write_text("a file")
    else:
        path = bench.folder.parent if in_the_way == "a parent" else bench.folder
        path.parent.mkdir(exist_ok=True)
        path.write_text("a file")
    monkeypatch.delenv("MAKELEVEL", raising=False)
    with pytest.raises(UserError, match=r"cannot write the suite's folder .*: set runs_dir=DIR"):
        bench.run()
    monkeypatch.setenv("MAKELEVEL", "1")
    with pytest.raises(UserError, match=r"run `\.venv/bin/ssodbench suite"):
        bench.run()


def test_variants_repeat_every_cell_under_names_of_their_own():
    given = ["suite=smoke", "suite.percents=[10]", "suite.methods=[supervised,stac]", "suite.reference=true"]
    plain = plan.plan(compose.load(given))
    cells = plan.plan(compose.load([*given, "suite.variants={base: [], fcos: ['detector=small_fcos']}"]))
    assert [(c.method, c.variant, c.percent) for c in cells] == [
        (c.method, variant, c.percent) for c in plain for variant in ("base", "fcos")
    ]
    assert [c.name for c in cells[:2]] == [
        f"shapes_supervised_{variant}_soft_teacher-10pct-fold1_seed1" for variant in ("base", "fcos")
    ]
    assert [c.needs.name for c in cells if c.needs] == [c.name for c in cells[:2]]  # stage 1 of the same variant
    assert [c.cfg.detector.name for c in cells[:2]] == ["small", "small_fcos"]
    for one in cells[:2]:
        assert config_sha256(compose.load(one.overrides)) == config_sha256(one.cfg)
    assert config_sha256(cells[0].cfg) == config_sha256(plain[0].cfg)  # a name changes no result
    assert all(c.variant is None and "base" not in c.name for c in plain)


@pytest.mark.parametrize(
    "given", ["suite.method_overrides={stac: ['seed=3']}", "suite.method_overrides.stac=['seed=3']"]
)
def test_settings_of_a_method_are_added_to_those_of_the_suite(given):
    found = compose.load(["suite=methods", given]).suite.method_overrides
    usual = compose.load(["suite=methods"]).suite.method_overrides
    assert dict(found) == {**usual, "stac": ["seed=3"]}
    assert len(usual) > 0


def test_keys_of_a_suite_need_a_suite():
    with pytest.raises(UserError, match=r"suite\.cost is a key of a suite: choose one too, such as suite=quick"):
        compose.load(["suite.cost={stac: 3}"])


def test_methods_and_settings_of_one_variant():
    given = [
        "suite=smoke",
        "suite.percents=[5,10]",
        "suite.methods=[supervised,soft_teacher]",
    ]
    variants = "suite.variants={base: [], fcos: ['detector=small_fcos']}"
    of_fcos = "suite.method_overrides={mean_teacher fcos: ['method.score=0.4']}"
    more = [
        "suite.variant_methods={fcos: [supervised,mean_teacher]}",
        "suite.cost={supervised: 1, supervised fcos: 3}",
    ]
    cells = plan.plan(compose.load([*given, variants, of_fcos, *more]))
    assert [(c.method, c.variant, c.percent, c.cost) for c in cells] == [
        (method, variant, percent, cost)
        for percent in (5, 10)
        for method, variant, cost in (
            ("supervised", "base", 1),
            ("supervised", "fcos", 3),
            ("soft_teacher", "base", 1.9),
            ("mean_teacher", "fcos", 1),
        )
    ]
    assert [c.cfg.method.score for c in cells if c.method == "mean_teacher"] == [0.4, 0.4]
    for one in cells:
        assert config_sha256(compose.load(one.overrides)) == config_sha256(one.cfg)


def test_variants_whose_folders_would_be_the_same(tmp_path):
    (tmp_path / "suite").mkdir()
    text = '# @package _global_\ndefaults: [smoke]\nsuite:\n  variants: {"a b": [], "a-b": []}\n'
    (tmp_path / "suite" / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"suite\.variants\.a-b would have the folders of suite\.variants\.a b"):
        plan.plan(compose.load(["suite=mine"], [tmp_path]))


def test_cells_are_configured_as_their_process_will_be():
    given = ["suite=smoke", "suite.percents=[0.5,10]", "suite.folds=[2]", "suite.methods=[stac]", "schedule.steps=9"]
    for one in plan.plan(compose.load(given)):
        alone = compose.load(one.overrides)
        assert config_sha256(alone) == config_sha256(one.cfg)
        assert alone.run_dir == str(one.run_dir)


def test_an_error_of_the_report_stops_nothing(bench, monkeypatch, capsys):
    """Hours of training do not end in a traceback of their table."""

    def broken(*_):
        raise ValueError("[/x] closes\nnothing")

    monkeypatch.setattr(suite.report, "show", broken)
    assert bench.run() == 1
    out, err = capsys.readouterr()
    assert (bench.folder / "report/report.html").exists()
    assert str(bench.folder / "report/report.html") in out
    (line,) = err.splitlines()
    assert line.startswith("ssodbench: the suite has ended, but not its report (ValueError: [/x] closes nothing)")
    assert set(bench.states().values()) == {"ok"}


def test_a_full_disk_at_the_end_stops_nothing(bench, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(suite.report, "run", full)
    assert bench.run() == 1
    out, err = capsys.readouterr()
    assert "50.0 (n=1)" in out
    assert "report.html (No space left on device): free space" in err
    assert len(err.splitlines()) == 1


def test_a_cell_that_the_system_does_not_start_fails_alone(bench):
    (bench.folder / "logs" / f"{cell('supervised', 5)}.log").mkdir(parents=True)
    assert bench.run() == 1
    states = bench.states()
    assert states.pop(cell("supervised", 5)) == "failed"
    assert states.pop(cell("stac", 5)) == "skipped"
    assert set(states.values()) == {"ok"}
    reasons = {c["name"]: c["reason"] for c in json.loads((bench.folder / "suite.json").read_text())["cells"]}
    assert "Is a directory" in reasons[cell("supervised", 5)]


def test_a_suite_without_a_record_says_why(bench, capsys):
    assert (
        bench.run("suite.methods=[supervised]", "suite.percents=[5]", behaviour={cell("supervised", 5): "mistake"}) == 1
    )
    out, err = capsys.readouterr()
    assert "no cell has left a record: ssodbench: the images are missing" in out
    assert not err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["suite.percents=[1,0.1]"], r"0\.1pct.* is less than one: give at least 0\.13; .*suite\.percents"),
        (["suite.percents=[100]"], r"method=stac needs unlabelled images"),
        (["split.protocol=unbiased_teacher"], r"needs split\.index_file"),
        (["data=custom", "data.root=nowhere"], r"nowhere/train\.json .*is not there"),
    ],
)
def test_what_cells_would_refuse_is_told_once_before_any_is_started(bench, monkeypatch, overrides, words):
    monkeypatch.setattr(suite, "prepare", prepare)
    with pytest.raises(UserError, match=words):
        bench.run(*overrides)
    assert bench.started() == []
    assert not bench.folder.exists()


def test_no_suite():
    with pytest.raises(UserError, match="suite=quick"):
        suite.run(compose.load([]))


@pytest.mark.parametrize(("cores", "gib", "expected"), [(2, 7.0, 2), (64, 7.0, 4), (64, 1000.0, 64), (1, 0.5, 1)])
def test_default_jobs(monkeypatch, cores, gib, expected):
    monkeypatch.setattr(jobs, "available_cores", lambda: cores)
    monkeypatch.setattr(jobs, "available_gib", lambda: gib)
    assert jobs.default_jobs(compose.load(["suite=quick", "device=cpu"])) == expected


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    cfg = compose.load(["suite=quick", "device=auto", "devices=2"])
    assert jobs.default_jobs(cfg) == 2
    assert [e["CUDA_VISIBLE_DEVICES"] for e in jobs.environments(cfg, 3)] == ["3,5", "6,7", "3,5"]


@pytest.mark.parametrize("name", ["quick", "smoke", "shapes", "bccd", "bccd_small", "raccoon", "coco"])
def test_the_suites_that_are_shipped(name):
    cells = plan.plan(compose.load([f"suite={name}"]))
    counts = {"quick": 9, "smoke": 9, "shapes": 30, "bccd": 9, "bccd_small": 9, "raccoon": 9, "coco": 60}
    assert len(cells) == counts[name]
    assert len({c.name for c in cells}) == len(cells)
    assert all((c.needs is not None) == (c.method == "stac") for c in cells)
    assert len({c.cfg.schedule.steps for c in cells}) == 1  # an equal number of student steps
    assert {c.cfg.split.protocol for c in cells} == {"stac" if name == "coco" else "soft_teacher"}


def test_a_suite_has_one_protocol():
    chosen = plan.plan(compose.load(["suite=coco", "split.protocol=soft_teacher"]))
    assert {c.cfg.split.protocol for c in chosen} == {"soft_teacher"}
    with pytest.raises(UserError, match=r"supervised soft_teacher, stac stac, .*: set split.protocol=NAME"):
        plan.plan(compose.load(["suite=quick", "preset=paper"]))


SUITE_AND_CELL = """
import os, subprocess, sys, time
cell = '''
import time
from harness.suite.cells import end_with_suite
end_with_suite()
print("ready", flush=True)
time.sleep(60)
'''
environment = {**os.environ, "SSODBENCH_SUITE_PROCESS": str(os.getpid() + int(sys.argv[1]))}
process = subprocess.Popen([sys.executable, "-c", cell], env=environment, stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, process.poll() if int(sys.argv[1]) == 0 else process.wait(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells children that their parent has ended")
@pytest.mark.parametrize("other_parent", [False, True])
def test_a_cell_ends_with_its_suite_however_that_ended(other_parent):
    command = [sys.executable, "-c", SUITE_AND_CELL, str(int(other_parent))]
    suite_process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    number, ended = suite_process.stdout.readline().split()
    waiting = [] if other_parent else [psutil.Process(int(number))]
    suite_process.kill()
    suite_process.wait()
    # The system ends a cell whose suite had ended before the cell could ask, too.
    assert ended == (str(-signal.SIGTERM) if other_parent else "None")
    _, alive = psutil.wait_procs(waiting, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
