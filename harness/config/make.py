"""From a group of the configuration to what its `_target_` names: the only place that calls Hydra's `instantiate`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harness.config.targets import GROUPS
from harness.core.types import UserError


def make(name: str, options: DictConfig | Mapping[str, Any], *values: Any, **named: Any) -> Any:
    """Constructs a group's object; what the user can mend comes out as one sentence.

    Args:
        name: a key of `GROUPS`, whose own keys the constructor does not get.
        options: the group, resolved here if it is not plain yet.
        values, named: what the program itself passes.

    Raises:
        UserError: the constructor does not take what it is given.
    """
    plain = OmegaConf.to_container(options, resolve=True) if isinstance(options, DictConfig) else options
    assert isinstance(plain, Mapping)
    kept = {str(key): value for key, value in plain.items() if key not in GROUPS[name].own}
    try:
        # Partial, since Hydra would turn dataclasses among the arguments into dictionaries.
        construct = instantiate({**kept, "_partial_": True}, _convert_="all")
        inspect.signature(construct).bind(*values, **named)
    except (HydraException, TypeError) as error:
        why = " ".join(str(error).split())
        said = f"{name}={plain.get('name') or plain.get('_target_')}"
        raise UserError(f"{said} cannot be built from its configuration: {why}") from error
    return construct(*values, **named)
