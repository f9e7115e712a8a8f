"""Help of every command, completion in a real shell, and the reference of keys against what is composed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harness import cli
from harness.commands import help as help_texts
from harness.commands.usage import COMMANDS
from harness.config import compose, reference, sources

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"ssodbench {name}")
    assert said.count(f"\n  ssodbench {name}") == 2
    for key in COMMANDS[name].takes:
        assert f"\n  {key}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_composed_and_are_not_refused(name: str) -> None:
    from harness.commands import usage

    assert (ROOT / "harness" / "commands" / f"{name}.py").is_file()
    for _, given in COMMANDS[name].examples:
        cfg = compose.load(cli.keyed(name, shlex.split(given)))
        if COMMANDS[name].takes:
            usage.refuse_unused(cfg, name)


def test_help_of_a_command_is_quick() -> None:
    script = (
        "import sys; from harness.cli import main; main(['train', '--help']); "
        "sys.exit(any(name in sys.modules for name in ('omegaconf', 'torch', 'hydra')))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("width", ["60", "200"])
def test_help_fits_the_terminal(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    meanings = [line for line in help_texts.command_help("predict").splitlines() if line.startswith(" " * 20)]
    assert meanings
    assert max(map(len, meanings)) <= int(width)


def complete(shell_line: str, folder: Path) -> set[str]:
    """What bash would offer behind a line."""
    script = (
        f"{help_texts.completion('bash')}\nCOMP_LINE={shlex.quote(shell_line)}\nCOMP_POINT=${{#COMP_LINE}}\n"
        f"COMP_CWORD={len(shell_line.split(' ')) - 1}\n_ssodbench\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    )
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=folder)
    return set(ran.stdout.split())


def test_bash_completes_commands_keys_options_and_files(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert complete("ssodbench pre", tmp_path) == {"prepare", "predict"}
    assert complete("ssodbench train split.pe", tmp_path) == {"split.percent="}
    assert {"soft_teacher", "stac"} <= complete("ssodbench train method=s", tmp_path)
    assert "photos" in complete("ssodbench predict images=pho", tmp_path)
    assert complete("ssodbench train nothing_like_it", tmp_path) == set()


def test_zsh_gets_a_script_and_other_shells_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out
    assert cli.main(["--completion", "fish"]) == 2
    assert "choose bash or zsh" in capsys.readouterr().err


def test_reference_page_is_that_of_the_files_today() -> None:
    page = (ROOT / "docs" / "reference" / "keys.md").read_text()
    assert page == reference.page(), "run `make reference`"


def test_every_key_that_is_composed_is_documented_with_a_meaning() -> None:
    documented = {entry.key: reference.meaning(entry) for entry in reference.general().values()}
    for _, file in reference.all_files():
        documented |= {entry.key: reference.meaning(entry) for entry in reference.entries(file)}
    wanted = set()
    for group in reference.GROUPS:
        for option in reference.options(group):
            cfg = compose.load([f"{group}={option}", "evaluation.every=null"])
            plain = OmegaConf.to_container(cfg, resolve=True)
            assert isinstance(plain, dict)
            wanted |= {key for key, _ in sources.leaves(plain)}
    unnamed = ("_target_", ".name", "preset_name")
    wanted = {key for key in wanted if not key.startswith(("cli.", "augment.")) and not key.endswith(unnamed)}
    above = {key: documented.get(key.rpartition(".")[0], "") for key in wanted}  # of what one line holds as a whole
    assert sorted(key for key in wanted if not (documented.get(key) or above[key])) == []


def test_a_comment_belongs_to_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "a.yaml").write_text(
        "# About\n# the file\nfirst: 1 # one # two\n# above\nsecond: 'a # b'\nthird: {x: [1, 2]} # all\n"
        "long: >- # of two lines\n  a\n  b\nfourth: 4 # starts\n"
        '  # goes on\npart:\n  # within\n  fifth: null\n  sixth: "q"\n'
    )
    monkeypatch.setattr(reference, "CONF_DIR", tmp_path)
    reference.entries.cache_clear()
    reference.about.cache_clear()
    found = {entry.key: (entry.value, entry.meaning) for entry in reference.entries("group/a.yaml")}
    assert reference.about("group/a.yaml") == "About the file"
    reference.entries.cache_clear()
    reference.about.cache_clear()
    assert found == {
        "group.first": ("1", "one # two"),
        "group.second": ("a # b", "above"),
        "group.third.x": ("[1, 2]", "all"),
        "group.long": ("a b", "of two lines"),
        "group.fourth": ("4", "starts goes on"),
        "group.part.fifth": ("null", "within"),
        "group.part.sixth": ("q", ""),
    }


def test_sources_name_the_file_that_wins(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tools.yaml").write_text("defaults: [coco]\nname: tools\nroot: /data/tools\n")
    found = sources.sources_of(
        compose.load(
            ["data=tools", "preset=paper", "method=soft_teacher", "batch.labeled=13", "augment=stac"], [tmp_path]
        )
    )
    assert found["batch.labeled"] == "the command line"
    assert found["batch.unlabeled"] == "method/preset/soft_teacher_paper.yaml"
    assert found["schedule.steps"] == "schedule/coco_180k.yaml"
    assert found["checkpointing.every"] == "preset/paper.yaml"
    assert found["checkpointing.keep"] == "config.yaml"
    assert found["data.root"] == str(tmp_path / "data" / "tools.yaml")
    assert found["data.train_annotations"] == "data/coco.yaml"
    assert found["method.lambda_u"] == "method/soft_teacher.yaml"
    assert found["augment.name"] == "augment/stac.yaml"
    assert found["seed"] == "filled by the program (config.yaml: null)"
    assert found["detector.style"].startswith("detector/faster_rcnn.yaml, ${")


def test_config_prints_sources_only_where_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--sources", "seed=7"]) == 0
    assert "\nseed: 7  # the command line\n" in capsys.readouterr().out
    assert cli.main(["prepare", "--sources"]) == 2
    assert "--sources belongs to" in capsys.readouterr().err
