"""Values against types: every constructor and every plain key, with anything that YAML can hold in any place."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness.config import checks, compose, schema, targets
from harness.config.plain import resolved
from harness.core import validate
from harness.core.types import UserError
from harness.core.validate import Limits, keys_of

GROUP_OPTIONS = [
    (group, file.stem) for group in targets.GROUPS for file in sorted((targets.CONF_DIR / group).glob("*.yaml"))
]
START = ("suite=quick method=stac", "method=soft_teacher data=voc detector=faster_rcnn_r50 launcher=slurm")


@pytest.mark.parametrize(("group", "option"), GROUP_OPTIONS)
def test_shipped_options_fit_their_constructors(group: str, option: str) -> None:
    """What ships is not looked at again in every command."""
    more = ["data.root=x"] if group == "data" and option != "shapes" else []
    values = resolved(compose.load([f"{group}={option}", *more]))
    targets.check_constructor(group, values[group])


@pytest.mark.parametrize("preset", ["small", "paper"])
@pytest.mark.parametrize(
    "method",
    ["supervised", "stac", "unbiased_teacher", "soft_teacher", "mean_teacher", "mixpl", "dense_teacher", "arsl"],
)
def test_shipped_presets_fit_their_constructors(method: str, preset: str) -> None:
    values = resolved(compose.load([f"method={method}", f"preset={preset}"]))
    for group in ("detector", "method"):
        targets.check_constructor(group, values[group])


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(node, dict | list):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(item, (*path, key))


def _plain(overrides: str) -> dict[str, Any]:
    plain = resolved(compose.load(overrides.split()))
    plain["cli"]["overrides"] = [f"{group}.x=1" for group in targets.GROUPS]  # none of them as shipped
    return plain


PLAIN = {overrides: _plain(overrides) for overrides in START}
PLACES = [(overrides, path) for overrides in START for path in _leaves(PLAIN[overrides]) if path[0] != "cli"]
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -1, 0, 1e30, math.nan, math.inf, "", "../x", "abc", "a\nb", "[x]", "\x00"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def _refusal(place: tuple[str, tuple[Any, ...]], value: Any) -> str | None:
    """What is said of a value in a place, or None where it is taken."""
    overrides, path = place
    plain = copy.deepcopy(PLAIN[overrides])
    node: Any = plain
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    try:
        checks.check_values(plain)
    except UserError as error:
        return str(error)
    return None


@settings(deadline=None, max_examples=1000)
@given(st.sampled_from(PLACES), _values)
def test_any_value_in_any_place_is_taken_or_refused_in_one_sentence(
    place: tuple[str, tuple[Any, ...]], value: Any
) -> None:
    message = _refusal(place, value)
    if message is None:
        json.dumps(value, allow_nan=False)  # what is taken is finite
    else:
        assert message.isprintable()
        assert len(message) < 1500
        assert any(str(key) in message for key in place[1])


@pytest.mark.parametrize("overrides", START)
def test_no_refusal_holds_a_character_that_cannot_be_seen(overrides: str) -> None:
    """Random text seldom falls on the few places where a name is taken and a later check refuses it."""
    said = {place: _refusal(place, "a\N{ZERO WIDTH SPACE}b") for place in PLACES if place[0] == overrides}
    assert {place: message for place, message in said.items() if message and not message.isprintable()} == {}


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([p for p in PLACES if isinstance(p[1][-1], str)]), st.text(min_size=1, max_size=8))
def test_an_unknown_key_is_refused_wherever_it_stands(place: tuple[str, Any], name: str) -> None:
    overrides, path = place
    plain = copy.deepcopy(PLAIN[overrides])
    node: Any = plain
    for key in path[:-1]:
        node = node[key]
    free = ("views", "cost", "method_overrides", "parameters")  # whose keys are names that the user chooses
    if name in node or any(key in free for key in path[-2:-1]):
        return
    node[name] = 1
    known = {"parameters", "momentum", "max", "small", "probability", "in_box", "nearest", "slope", "square"}
    if name not in known:
        with pytest.raises(UserError):
            checks.check_values(plain)


@dataclass
class Inner:
    share: Annotated[float, Limits(ge=0, le=1)]
    many: tuple[int, int] = (1, 2)


class Base:
    def __init__(self, runtime: object, *, count: Annotated[int, Limits(ge=1)] = 1, where: str | Path = "") -> None:
        """What `Derived` passes on to."""


class Derived(Base):
    def __init__(
        self,
        *args: Any,
        mode: Literal["a", "b"] | None = None,  # noqa: ARG002
        inner: Annotated[Mapping[str, Any], keys_of(Inner)] | None = None,  # noqa: ARG002
        some: Annotated[Mapping[str, Any], keys_of(Inner, partial=True)] | None = None,  # noqa: ARG002
        names: str | Sequence[str] = (),  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"count": 3, "where": "x", "mode": None},
        {"inner": {"share": 1, "many": [3, 4]}, "some": {"share": None}},
        {"names": "x"},
        {"names": ["x", "y"]},
    ],
)
def test_arguments_that_fit(values: dict[str, Any]) -> None:
    validate.check_arguments(Derived, values, "group", ("runtime",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "group.count=0 must be a whole number of at least 1"),
        ({"count": True}, "group.count=true must be a whole number of at least 1"),
        ({"count": 2.0}, "group.count=2.0 must be a whole number of at least 1"),
        ({"cuont": 1}, "the key group.cuont is not known; did you mean count?"),
        ({"runtime": 1}, "the key group.runtime is not known"),
        ({"where": 3}, "group.where=3 must be a path"),
        ({"mode": "c"}, "group.mode=c must be one of a, b or null"),
        ({"inner": {}}, "group.inner.share is missing: give a number of at least 0 and at most 1"),
        ({"inner": {"share": 2}}, "group.inner.share=2 must be a number of at least 0 and at most 1"),
        ({"inner": {"share": math.nan}}, "group.inner.share=nan must be"),
        ({"inner": {"share": 1, "many": [1]}}, "group.inner.many=[1] must be a list of 2, each a whole number"),
        ({"some": {"many": [1, "x"]}}, "group.some.many[1]=x must be a whole number"),
        ({"names": [3]}, "group.names[0]=3 must be a text"),
        ({"names": 3}, "group.names=3 must be a text or a list"),
    ],
)
def test_arguments_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate.check_arguments(Derived, values, "group", ("runtime",))
    assert str(caught.value).startswith(message)


def test_every_key_of_the_configuration_has_a_type() -> None:
    plain = OmegaConf.to_container(OmegaConf.load(targets.CONF_DIR / "config.yaml"))
    assert isinstance(plain, dict)
    for section in ("split", "batch", "evaluation", "checkpointing", "logging", "profile", "prepare"):
        kind = validate._fields(schema.Config, False)[section].kind
        assert set(validate._fields(kind, False)) == set(plain[section])
