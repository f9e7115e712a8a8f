"""A configuration as plain data: every `${...}` replaced, or one sentence about the one that cannot be."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.core import validate
from harness.core.types import UserError


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data, every `${...}` replaced.

    Raises:
        UserError: one names a key that is missing, goes round in a circle, or cannot be read.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        raise UserError(_unresolved(cfg, error)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _unresolved(cfg: DictConfig, error: Exception) -> str:
    """One sentence about the first value that cannot be resolved."""
    for key, text in _leaves(OmegaConf.to_container(cfg, resolve=False), ""):
        try:
            OmegaConf.select(cfg, key, throw_on_missing=True)
        except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as mistake:
            why = str(mistake).strip().splitlines()[0]
            if isinstance(mistake, RecursionError) or "Recursive" in why:
                return f"{key}={validate.shown(text)} goes round in a circle: give it a value of its own"
            return f"{key}={validate.shown(text)} cannot be resolved ({why}): name a key that has a value, or give one"
    return f"a ${{...}} in the configuration cannot be resolved ({validate.shown(str(error))})"


def _leaves(node: Any, key: str) -> list[tuple[str, str]]:
    """Dotted keys of texts that hold an interpolation, or say that a value is missing."""
    if isinstance(node, str):
        return [(key, node)] if "${" in node or node == "???" else []
    if isinstance(node, dict):
        return [leaf for name, item in node.items() for leaf in _leaves(item, f"{key}.{name}" if key else str(name))]
    if isinstance(node, list):
        return [leaf for place, item in enumerate(node) for leaf in _leaves(item, f"{key}[{place}]")]
    return []
