"""Values from outside against types: strict, every mistake one sentence with the key, the value and what is allowed.

Types are annotations: of the dataclasses in `harness.config.schema` and of the constructors that `_target_` names, with
`Limits` in `Annotated` for bounds. A whole number stands for a number; nothing else is converted. (msgspec knows such
bounds too, but its `Meta` crashes Python 3.11 at the end of the process, and it says neither under which key of a
mapping a value does not fit nor what is allowed there.)
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from harness.core.types import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Bounds of a number, lengths of a list or text, and words for them: put beside a type by `Annotated`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    whole_from: int | None = None  # numbers from here on are whole; this one itself is not written 1.0
    least: int = 0  # items or characters
    most: int | None = None
    pattern: str | None = None
    one_of: tuple[str, ...] = ()  # texts
    words: str | None = None  # what is allowed, where the type says it badly
    keys_of: type | None = None  # of a mapping: its keys are fields of this dataclass,
    partial: bool = False  # each of which may be null or left out


Share = Annotated[float, Limits(ge=0, le=1)]
Weight = Annotated[float, Limits(ge=0, le=1e6)]  # of a loss
Positive = Annotated[float, Limits(gt=0, le=1e6)]
NotNegative = Annotated[float, Limits(ge=0, le=1e6)]
Pixels = Annotated[float, Limits(gt=0, le=100_000)]
Channels = Annotated[int, Limits(ge=1, le=16_384)]
Images = Annotated[int, Limits(ge=1, le=65_536)]  # of a batch
Steps = Annotated[int, Limits(ge=1, le=10**9)]
Threads = Annotated[int, Limits(ge=0, le=1024)]
Seed = Annotated[int, Limits(ge=0, le=2**63 - 1)]
File = Annotated[str, Limits(least=1, most=4096, words="a path (./NAME where it looks like a number)")]
Name = Annotated[
    str,
    Limits(
        pattern=r"\A(?![.\s])[^/\\\x00-\x1f\x7f]{1,100}\Z",
        words="a name of at most 100 characters, without / and not beginning with a dot, in quotes if it looks like a "
        "number",
    ),
]


def keys_of(kind: type, partial: bool = False) -> Limits:
    """For an annotated mapping: its keys are the fields of a dataclass; `partial`: each may be null or left out."""
    return Limits(keys_of=kind, partial=partial)


@dataclass(frozen=True)
class _Field:
    kind: Any
    required: bool


def check(kind: Any, value: Any, key: str = "") -> None:
    """Checks plain data (dicts, lists, texts, numbers, booleans, None) against a type.

    Args:
        kind: a type: of numbers, texts, lists, dicts, dataclasses, their unions, `Literal`, with `Limits` or without;
            any other type takes everything.
        value: what was given.
        key: its dotted key, for messages; empty for a whole configuration.

    Raises:
        UserError: at the first value that does not fit.
    """
    base, limits = _base(kind, value)
    if isinstance(value, dict) and _is_mapping(base):
        _check_mapping(base, limits, value, key)
    elif isinstance(value, list) and _is_list(base):
        items = _items(base, len(value))
        if items is None or not _has_length(limits, value):
            raise _error(kind, value, key)
        for place, (item_kind, item) in enumerate(zip(items, value, strict=True)):
            check(item_kind, item, f"{key}[{place}]")
    elif not _fits(base, limits, value):
        raise _error(kind, value, key)


def make_checked(kind: type[T], values: Mapping[str, Any], key: str) -> T:
    """A dataclass from checked keys.

    Raises:
        UserError: as `check`.
    """
    plain = dict(values)
    check(kind, plain, key)
    return kind(**plain)


def check_arguments(
    target: Callable[..., Any],
    values: Mapping[str, Any],
    key: str,
    given: Iterable[str],
    own: Iterable[str] = (),
    elsewhere: Callable[[str], str] = lambda _: "",
) -> None:
    """Checks keys against a constructor's parameters.

    Args:
        target: a class or a function.
        values: its arguments from the configuration.
        key: the group's name, for messages.
        given: parameters that the program itself passes.
        own: keys of the group that the constructor does not take; named where a key is not known.
        elsewhere: what is said of a key that is not known here, as it is of something else; "" for no such.

    Raises:
        UserError: as `check`.
    """
    parameters, open_ended = _parameters(target)
    passed = set(given)
    known = {name: field for name, field in parameters.items() if name not in passed}
    if open_ended:
        known |= {name: _Field(Any, required=False) for name in values if name not in known}
    for name in values:
        if name not in (*known, *own) and (said := elsewhere(name)):
            raise UserError(said)
    _check_fields(known, values, key, own)


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing."""
    found = difflib.get_close_matches(name, list(known), 1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def shown(value: Any) -> str:
    """As the user would write it, on one line and not without end."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = value if isinstance(value, str) else _digits(value) if isinstance(value, int) else str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _digits(number: int) -> str:
    """Python refuses to write out numbers of more than some thousand digits."""
    return str(number) if number.bit_length() < 4096 else f"a number of {number.bit_length()} bits"


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, _Field], bool]:
    """A constructor's parameters by name, and whether it takes any others; `**kwargs` are looked up in the bases."""
    found: dict[str, _Field] = {}
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
    for function in functions:
        hints = _hints(function)
        signature = inspect.signature(function).parameters.values()
        for parameter in [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]:
            if parameter.name != "self" or function is target:
                required = parameter.default is parameter.empty
                found.setdefault(parameter.name, _Field(hints.get(parameter.name, Any), required))
        if not any(p.kind is p.VAR_KEYWORD for p in signature):
            return found, False
    return found, not inspect.isclass(target)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations as types; without those that name what is only imported for type checkers."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_mapping(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return origin in (dict, collections.abc.Mapping) or (dataclasses.is_dataclass(origin))


def _is_list(kind: Any) -> bool:
    return (typing.get_origin(kind) or kind) in (list, tuple, collections.abc.Sequence, collections.abc.Iterable)


def _base(kind: Any, value: Any) -> tuple[Any, Limits]:
    """A type without its wrapping, and its limits; of several that one which the value was meant for."""
    if typing.get_origin(kind) is Annotated:
        limits = next((extra for extra in kind.__metadata__ if isinstance(extra, Limits)), Limits())
        inner = kind.__origin__
        if not _is_union(inner):
            return inner, limits
        base, own = _base(inner, value)
        return base, own if own != Limits() else limits
    if _is_union(kind):
        for member in typing.get_args(kind):
            base, limits = _base(member, value)
            if _is_meant(base, limits, value):
                return base, limits
    return kind, Limits()


def _is_meant(kind: Any, limits: Limits, value: Any) -> bool:
    """Whether one of several types is that of a value; what dicts and lists hold is looked at afterwards."""
    if isinstance(value, dict):
        return _is_mapping(kind)
    return _is_list(kind) if isinstance(value, list) else _fits(kind, limits, value)


def _check_mapping(kind: Any, limits: Limits, values: dict[Any, Any], key: str) -> None:
    if limits.keys_of is not None or dataclasses.is_dataclass(kind):
        _check_fields(_fields(limits.keys_of or kind, limits.partial), values, key)
        return
    name_kind, item_kind = typing.get_args(kind) or (Any, Any)
    for name, item in values.items():
        if not isinstance(name, str):
            raise UserError(f"{_join(key, name)}: a key must be a text: put {shown(name)} in quotes")
        base, name_limits = _base(name_kind, name)
        if not _fits(base, name_limits, name):
            raise UserError(f"the key {_join(key, name)} must be {allowed(name_kind)}")
        check(item_kind, item, _join(key, name))


@functools.cache
def _fields(kind: Any, partial: bool) -> dict[str, _Field]:
    """The fields of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    return {
        f.name: _Field(
            typing.Optional[hints[f.name]] if partial else hints[f.name],  # noqa: UP045 - of a value
            not partial and f.default is missing and f.default_factory is missing,
        )
        for f in dataclasses.fields(kind)
    }


def _items(kind: Any, count: int) -> tuple[Any, ...] | None:
    """The types of a list's items; None where a list must have another length."""
    members = typing.get_args(kind) or (Any,)
    if (typing.get_origin(kind) or kind) is tuple and Ellipsis not in members and typing.get_args(kind):
        return members if len(members) == count else None
    return (members[0],) * count


def _fits(kind: Any, limits: Limits, value: Any) -> bool:
    """Whether a single value is of a kind; dicts and lists are looked into elsewhere."""
    if _is_union(kind) or typing.get_origin(kind) is Annotated:
        base, inner = _base(kind, value)
        return base is not kind and _fits(base, inner, value)
    if typing.get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if kind is None or kind is types.NoneType:
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int or kind is float:
        return _is_number(value) and (kind is float or isinstance(value, int)) and _within(limits, value)
    if kind is str or kind is Path:
        return isinstance(value, str) and _is_text(limits if kind is str else Limits(least=1), value)
    return not _is_mapping(kind) and not _is_list(kind)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _within(limits: Limits, value: float) -> bool:
    return (
        (limits.ge is None or value >= limits.ge)
        and (limits.gt is None or value > limits.gt)
        and (limits.le is None or value <= limits.le)
        and (limits.whole_from is None or value < limits.whole_from or _is_whole(value, limits.whole_from))
    )


def _is_whole(value: float, least: int) -> bool:
    return isinstance(value, int) or (value > least and value.is_integer())


def _is_text(limits: Limits, value: str) -> bool:
    if limits.one_of and value not in limits.one_of:
        return False
    return _has_length(limits, value) and (limits.pattern is None or re.search(limits.pattern, value) is not None)


def _has_length(limits: Limits, value: list[Any] | str) -> bool:
    return len(value) >= limits.least and (limits.most is None or len(value) <= limits.most)


def _check_fields(known: Mapping[str, _Field], values: Mapping[Any, Any], key: str, others: Iterable[str] = ()) -> None:
    for name, value in values.items():
        if name not in known:
            names = [*known, *others]
            hint = near(shown(name), names) or (f": known are {', '.join(names)}" if names else ": it takes none")
            raise UserError(f"the key {_join(key, name)} is not known{hint}")
        check(known[name].kind, value, _join(key, name))
    for name, field in known.items():
        if field.required and name not in values:
            raise UserError(f"{_join(key, name)} is missing: give {allowed(field.kind)}")


def _join(key: str, name: Any) -> str:
    return f"{key}.{shown(name)}" if key else shown(name)


def _error(kind: Any, value: Any, key: str) -> UserError:
    choices = [choice for choice in _choices(kind) if isinstance(choice, str)]
    hint = near(value, choices) if isinstance(value, str) else ""
    return UserError(f"{key}={shown(value)} must be {allowed(kind)}{hint}")


def _choices(kind: Any) -> list[Any]:
    if _is_union(kind):
        return [choice for member in typing.get_args(kind) for choice in _choices(member)]
    if typing.get_origin(kind) is Annotated:
        return [choice for extra in kind.__metadata__ if isinstance(extra, Limits) for choice in extra.one_of]
    return list(typing.get_args(kind)) if typing.get_origin(kind) is Literal else []


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path", None: "null"}


def allowed(kind: Any) -> str:
    """A type in words."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        limits = next((extra for extra in kind.__metadata__ if isinstance(extra, Limits)), Limits())
        if limits.keys_of is not None:
            return f"keys out of {', '.join(_fields(limits.keys_of, True))}"
        if limits.one_of:
            return f"one of {', '.join(limits.one_of)}"
        more = f" with at least {limits.least} of them" if limits.least else ""
        return limits.words or allowed(kind.__origin__) + (more if _is_list(kind.__origin__) else _bounds(limits))
    if _is_union(kind):
        members = tuple(sorted(members, key=lambda member: member is types.NoneType))
        return " or ".join(dict.fromkeys(allowed(member) for member in members if not _is_double(member, members)))
    if origin is Literal:
        return f"one of {', '.join(shown(choice) for choice in members)}"
    if _is_list(kind):
        items = _items(kind, len(members))
        if origin is tuple and Ellipsis not in members:
            return f"a list of {len(members)}, each {allowed(members[0])}"
        return f"a list, written [A,B], each {allowed(items[0] if items else Any)}"
    if _is_mapping(kind):
        if dataclasses.is_dataclass(kind):
            return f"keys out of {', '.join(field.name for field in dataclasses.fields(kind))}"
        return "keys with values, written {KEY: VALUE}"
    return _WORDS.get(None if kind is types.NoneType else kind, "a value")


def _is_double(member: Any, members: tuple[Any, ...]) -> bool:
    """`str | Path` is one thing to the user."""
    return member is str and Path in members


def _bounds(limits: Limits) -> str:
    low = f"of at least {_plain(limits.ge)}" if limits.ge is not None else ""
    low = f"above {_plain(limits.gt)}" if limits.gt is not None else low
    high = f"at most {_plain(limits.le)}" if limits.le is not None else ""
    words = f"{low} and {high}" if low and high else low or (f"of {high}" if high else "")
    return f" {words}" if words else ""


def _plain(bound: float) -> str:
    """Whole where it is."""
    return str(int(bound)) if float(bound).is_integer() else f"{bound:g}"
