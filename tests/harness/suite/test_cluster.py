"""Suites as jobs, with stand-ins for Slurm's programs; tests/cluster has a real one."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.config import compose
from harness.config.identity import config_sha256, identity
from harness.core.types import RunError, UserError
from harness.launch.slurm_queue import JobState
from harness.suite import cluster, suite
from harness.suite.claims import Claims
from harness.suite.plan import SuiteCell

pytestmark = pytest.mark.timeout(120)

# Gives out numbers from 10 on, notes the command, and keeps each script.
SBATCH = """
for script; do :; done
mapfile -t before < {state}/commands
number=$((10 + ${#before[@]}))
echo "$*" >> {state}/commands
while IFS= read -r line; do echo "$line"; done < "$script" > {state}/$number.sh
echo $number
"""
SQUEUE = '[ -e {state}/silent ] && exit 1\nwhile IFS= read -r line; do echo "$line"; done < {state}/queue'
# The last job runs while it is looked at the first three times.
SQUEUE_OF_LAST = """#!/bin/bash
echo look >> {state}/looks
mapfile -t looks < {state}/looks
[ ${#looks[@]} -le 3 ] && echo '12|RUNNING|n1|None|smoke-report'
exit 0
"""
SCANCEL = 'echo "$*" >> {state}/cancelled'
SCONTROL = "echo 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1"


@pytest.fixture
def slurm(tmp_path, monkeypatch, capsys):
    """Runs a suite with the stand-ins."""
    state, programs = tmp_path / "state", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    for name in ("commands", "queue", "cancelled"):
        (state / name).touch()
    for name, script in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (programs / name).write_text("#!/bin/bash\n" + script.replace("{state}", str(state)))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    prepared = []
    monkeypatch.setattr(suite, "prepare", lambda cells, _: prepared.extend(cells))
    monkeypatch.setattr("harness.report.plots.draw", lambda *_: {})
    kept, make_plan = [], suite.plan

    def keep(cfg):
        kept[:] = make_plan(cfg)
        return kept

    monkeypatch.setattr(suite, "plan", keep)
    folder = Path("runs/smoke")

    def run(*overrides):
        return suite.run(compose.load(["suite=smoke", "launcher=slurm", "device=cpu", *overrides]))

    def finish(cell, status="ok", **more):
        record = {
            **dict.fromkeys(("preset", "detector", "dataset_sha256", "val_sha256", "split_sha256"), ""),
            "schema_version": 2,
            "status": status,
            "cell": cell.name,
            "suite": "smoke",
            "ap": 50.0,
            "method": cell.method,
            "percent": cell.percent,
            "fold": cell.fold,
            "seed": cell.seed,
            "steps": 6,
            "dataset": "shapes",
            "protocol": "soft_teacher",
            "score_threshold": 0.05,
            "config_sha256": config_sha256(cell.cfg),
            "config": identity(cell.cfg),
            **more,
        }
        cell.run_dir.mkdir(parents=True, exist_ok=True)
        (cell.run_dir / "record.json").write_text(json.dumps(record))

    return SimpleNamespace(
        run=run,
        folder=folder,
        state=state,
        cells=kept,
        prepared=prepared,
        finish=finish,
        cell=lambda method, percent: next(c for c in kept if (c.method, c.percent) == (method, percent)),
        commands=lambda: (state / "commands").read_text().splitlines(),
        script=lambda number: (state / f"{number}.sh").read_text(),
        jobs=lambda: {n: e["id"] for n, e in json.loads((folder / "slurm/jobs.json").read_text()).items()},
        queue=lambda *rows: (state / "queue").write_text("".join(f"{row}\n" for row in rows)),
        cancelled=lambda: (state / "cancelled").read_text().split(),
        printed=lambda: capsys.readouterr().out,
    )


def test_a_suite_is_two_arrays_and_a_report(slurm):
    assert slurm.run("suite.jobs=4", "devices=1") == 0
    first, second, report = slurm.commands()
    assert "--array=0-5%4" in first
    assert "--dependency" not in first
    assert "--array=0-2%4" in second or re.search(r"--array=[\d,-]+%4", second)
    assert "--dependency=aftercorr:10 --kill-on-invalid-dep=yes" in second
    assert "--dependency=afterany:10:11" in report
    assert "--array" not in report
    jobs = slurm.jobs()
    for cell in slurm.cells:
        number, task = jobs[cell.name].split("_")
        line = re.search(rf"^  {task}\) .*$", slurm.script(number), re.MULTILINE)
        assert line is not None
        assert f"run_dir={cell.run_dir}" in line[0]
        assert f"logs/{cell.name}.log" in line[0]
        if cell.needs is not None:
            assert jobs[cell.needs.name] == f"10_{task}"
            assert f"method.offline.checkpoint={cell.needs.run_dir}" in line[0]
    assert "suite.report=true" in slurm.script(12)
    assert "SSODBENCH_SUITE=smoke" in slurm.script(10)
    assert len(slurm.prepared) == 9


def test_the_same_command_submits_what_is_missing_or_failed(slurm):
    given = ("suite.methods=[supervised,stac]",)
    slurm.run(*given)
    jobs = slurm.jobs()
    names = {cell.name: "smoke-1" if cell.method == "supervised" else "smoke-2" for cell in slurm.cells}
    slurm.finish(slurm.cell("supervised", 1))
    slurm.finish(slurm.cell("supervised", 5), "failed", error="RunError: the loss is not finite", ap=None)
    waiting = [slurm.cell("supervised", 10), slurm.cell("stac", 1), slurm.cell("stac", 10)]
    slurm.queue(
        *(f"{jobs[cell.name]}|PENDING||Priority|{names[cell.name]}" for cell in waiting),
        f"{jobs['report']}|PENDING||Dependency|smoke-report",
    )
    slurm.printed()
    assert slurm.run(*given, "suite.retry_failed=false") == 1
    assert "4 jobs in the queue, 0 cells to submit" in slurm.printed()
    assert len(slurm.commands()) == 3
    slurm.run(*given)
    again = slurm.jobs()
    assert {name for name in jobs if again[name] != jobs[name]} == {
        slurm.cell("supervised", 5).name,
        slurm.cell("stac", 5).name,
        "report",
    }
    assert slurm.cancelled() == [jobs["report"]]
    *_, first, second, report = slurm.commands()
    assert "--dependency=aftercorr:13" in second
    assert "--array=0%1" in first
    assert set(re.findall(r"\d+", re.search(r"afterany:(\S+)", report)[1])) == {"10", "11", "13", "14"}


def test_a_first_stage_that_is_in_the_queue_or_finished_is_not_submitted_again(slurm):
    slurm.run("suite.methods=[supervised]")
    jobs = slurm.jobs()
    slurm.finish(slurm.cell("supervised", 1))
    five = slurm.cell("supervised", 5)
    slurm.queue(f"{jobs[five.name]}|RUNNING|n1|None|smoke-1")
    slurm.finish(slurm.cell("supervised", 10))
    slurm.run("suite.methods=[supervised,stac]")
    first, second = slurm.commands()[2:4]
    assert {("--dependency" in line) for line in (first, second)} == {False, True}
    assert f"--dependency=afterok:{jobs[five.name]} " in first + second
    assert slurm.jobs()[five.name] == jobs[five.name]


def test_status_tells_records_and_queue(slurm):
    slurm.run()
    jobs = slurm.jobs()
    slurm.finish(slurm.cell("supervised", 1))
    slurm.finish(slurm.cell("supervised", 5), "failed", error="RunError: the loss is not finite", ap=None)
    slurm.finish(slurm.cell("soft_teacher", 1), "interrupted", ap=None)
    slurm.queue(
        f"{jobs[slurm.cell('supervised', 10).name]}|RUNNING|n1|None|smoke-1",
        f"{jobs[slurm.cell('stac', 10).name]}|PENDING||Dependency|smoke-2",
        f"{jobs[slurm.cell('stac', 1).name]}|PENDING||Resources|other",
    )
    slurm.printed()
    assert slurm.run("suite.status=true") == 0
    said = slurm.printed()
    for words in ("50.0", "the loss is not finite", "RUNNING on n1", "PENDING (Dependency)", "1 ok", "1 queued"):
        assert words in said
    assert "1 running" in said
    assert len(slurm.commands()) == 3
    (slurm.state / "silent").touch()
    with pytest.raises(RunError, match="Slurm does not say"):  # rather than to submit what may be there
        slurm.run()


@pytest.mark.parametrize("how", ["silent", "missing"])
def test_status_without_squeue_is_that_of_the_records(slurm, how):
    slurm.run()
    slurm.finish(slurm.cell("supervised", 1))
    slurm.finish(slurm.cell("supervised", 5), "failed", error="RunError: the loss is not finite", ap=None)
    if how == "silent":
        (slurm.state / "silent").touch()
    else:
        (slurm.state.parent / "bin" / "squeue").unlink()
    slurm.printed()
    assert slurm.run("suite.status=true") == 0
    first, *table = slurm.printed().splitlines()
    assert re.fullmatch(r"Slurm does not say what is in the queue \(squeue.*\): this is what the records say", first)
    said = "\n".join(table)
    assert "50.0" in said
    assert "the loss is not finite" in said
    assert "1 ok" in said
    assert "1 failed" in said
    assert "7 waiting" in said


def test_who_waits_for_the_last_job_does_not_write_its_report_again(slurm, monkeypatch):
    """One that failed is made up for."""
    written = []
    monkeypatch.setattr(suite.report, "run", lambda *_: written.append("report"))
    monkeypatch.setattr(suite.report, "show", lambda *_: None)
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.1)
    for code, times in ((0, 0), (1, 1)):
        squeue = slurm.state.parent / "bin" / "squeue"
        squeue.write_text(SQUEUE_OF_LAST.replace("{state}", str(slurm.state)))
        (slurm.state / "looks").write_text("")
        assert slurm.run("suite.methods=[supervised]", "suite.status=true") == 0
        for cell in slurm.cells:
            slurm.finish(cell)
        (slurm.folder / "slurm").mkdir(parents=True, exist_ok=True)
        entry = {"report": {"id": "12", "name": "smoke-report"}}
        (slurm.folder / "slurm/jobs.json").write_text(json.dumps(entry))
        (slurm.folder / "slurm/12.exit").write_text(f"{code}\n")
        written.clear()
        (slurm.state / "looks").write_text("")
        assert slurm.run("suite.methods=[supervised]", "suite.wait=true") == 0
        assert len(written) == times
    assert "report:" in slurm.printed()


def test_jobs_are_cancelled_when_that_is_asked(slurm):
    slurm.run("suite.methods=[supervised]")
    jobs = slurm.jobs()
    cell = slurm.cell("supervised", 1)
    slurm.queue(f"{jobs[cell.name]}|RUNNING|n1|None|smoke-1", f"{jobs['report']}|PENDING||Dependency|smoke-report")
    assert slurm.run("suite.methods=[supervised]", "suite.cancel=true") == 0
    assert sorted(slurm.cancelled()) == sorted([jobs[cell.name], jobs["report"]])
    with pytest.raises(UserError, match="for launcher=slurm"):
        suite.run(compose.load(["suite=smoke", "suite.cancel=true"]))


def test_a_cell_that_a_suite_of_this_machine_runs_is_left_to_it(slurm):
    slurm.run("suite.status=true")
    cell = slurm.cell("supervised", 1)
    claims = Claims(slurm.folder)
    claims.make_folder()
    assert claims.take(cell.name, cell.run_dir)
    assert slurm.run("suite.methods=[supervised,stac]") == 0
    jobs = slurm.jobs()
    assert cell.name not in jobs
    assert slurm.cell("stac", 1).name not in jobs  # its first stage
    assert len(jobs) == 5
    claims.release(cell.name)


def test_nobody_is_waited_for_who_cannot_be_reached(slurm):
    """Without Slurm the command says so, before it has made anything but what cells share."""
    (slurm.state.parent / "bin" / "sbatch").unlink()
    with pytest.raises(UserError, match="login node"):
        slurm.run()


def test_a_report_that_slurm_does_not_take_is_told(slurm):
    script = slurm.state.parent / "bin" / "sbatch"
    refusing = 'case "$*" in *smoke-report.sh) echo "sbatch: error: no CPU here" >&2; exit 1;; esac\n'
    script.write_text(script.read_text().replace("#!/bin/bash\n", "#!/bin/bash\n" + refusing))
    assert slurm.run("suite.methods=[supervised]") == 0
    assert "the report is not made by itself" in slurm.printed()
    assert "report" not in slurm.jobs()
    slurm.finish(slurm.cell("supervised", 1))
    assert slurm.run("suite.methods=[supervised]", "suite.report=true", "report.gallery=0") == 0
    assert (slurm.folder / "report/report.html").exists()


def _random_cells(rng: random.Random) -> list[SuiteCell]:
    count = rng.randint(1, 30)
    cells = [_cell(f"a{i}") for i in range(count)]
    cells += [_cell(f"b{i}", needs=rng.choice(cells[:count])) for i in range(rng.randint(0, 20))]
    rng.shuffle(cells)
    return cells


def _cell(name: str, needs: SuiteCell | None = None) -> SuiteCell:
    return SuiteCell(name, "m", 1.0, 1, 1, Path(name), [], None, needs=needs, urgency=float(len(name)))


def test_arrays_keep_every_dependency(monkeypatch):
    """Each cell is in one array; it comes after its first stage, in the task of the same number or by that job."""
    monkeypatch.setattr(cluster, "MOST_TASKS", 7)
    rng = random.Random(3)
    for _ in range(300):
        cells = _random_cells(rng)
        everyone = {cell.name: cell for cell in cells}
        queued = {
            n: JobState(f"9_{i}", "RUNNING") for i, n in enumerate(everyone) if n[0] == "a" and rng.random() < 0.2
        }
        finished = {name for name in everyone if name[0] == "a" and name not in queued and rng.random() < 0.2}
        machines = {name: rng.choice("xy") for name in everyone}
        submitted = [cell for cell in cells if cell.name not in queued and cell.name not in finished]
        made = cluster.arrays(submitted, queued, machines)
        placed = [(cell, array, place) for array in made for place, cell in array.cells.items()]
        assert sorted(cell.name for cell, *_ in placed) == sorted(cell.name for cell in submitted)
        for cell, array, place in placed:
            assert 0 <= place < 7
            if cell.needs is None or cell.needs.name in finished:
                assert array.after is None
            elif cell.needs.name in queued:
                assert array.after == queued[cell.needs.name].id
            else:
                assert made.index(array.after) < made.index(array)
                assert array.after.cells[place] is cell.needs
        for array in made:
            assert len({machines[cell.name] for cell in array.cells.values()}) == 1
