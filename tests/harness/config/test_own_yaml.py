"""The user's own YAML in --config-dir: it is found, and never passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import compose
from harness.config.targets import CONF_DIR
from harness.core.types import UserError


def test_user_yaml_is_found_in_a_config_dir(tmp_path: Path) -> None:
    folder = tmp_path / "my conf" / "schedule"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [small]\nsteps: 77\n")
    assert compose.load(["schedule=mine"], [tmp_path / "my conf"]).schedule.steps == 77
    with pytest.raises(UserError, match="not a folder"):
        compose.load([], [tmp_path / "missing"])


@pytest.mark.parametrize(
    "overrides",
    [["augment=small"], ["augment=small", "preset=paper"], ["preset=small"], ["method=mean_teacher", "preset=photos"]],
)
def test_a_file_with_the_name_of_a_shipped_option_is_not_passed_over(tmp_path: Path, overrides: list[str]) -> None:
    shipped = CONF_DIR / "augment" / "small.yaml"
    (tmp_path / "augment").mkdir()
    own = tmp_path / "augment" / "small.yaml"
    own.write_bytes(shipped.read_bytes())  # says the same
    compose.load(overrides, [tmp_path])
    own.write_text(shipped.read_text().replace("flip: 0.5", "flip: 0"))
    with pytest.raises(UserError, match=r"small\.yaml would be passed over.*say augment=my_small"):
        compose.load(overrides, [tmp_path])
    compose.load(["augment=stac"], [tmp_path])  # another one is chosen
    own.rename(own.with_stem("my_small"))
    assert compose.load([*overrides, "augment=my_small"], [tmp_path]).augment.views.weak.flip == 0


def test_a_file_with_such_a_name_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "augment").mkdir()
    (tmp_path / "augment" / "small.yaml").write_bytes(b"name: \xff")
    with pytest.raises(UserError, match=r"small\.yaml cannot be read \(line 1 is not UTF-8 text\)"):
        compose.load(["augment=small"], [tmp_path])
