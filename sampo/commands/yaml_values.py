"""Checks of the values in a YAML file of options, which argparse does not see: it converts texts alone."""

import re
from collections.abc import Iterable
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..io.schemas import shown, typed


def find_wrong_shapes(config: dict[str, Any], kinds: Iterable[type], path: str) -> dict[str, str]:
    """Lists, mappings, true, false and null where they do not belong; an issue for each name."""
    known = {f.name: (get_type_hints(kind)[f.name], f.default) for kind in kinds for f in fields(kind)}
    return {
        key: f"`{key}` in {path} must be {expected}, got {shown(value)}."
        for key, value in config.items()
        if key in known and (expected := _expected_shape(key, value, *known[key]))
    }


def _expected_shape(name: str, value: Any, hint: Any, default: Any) -> str | None:
    """Describe what a value must be; None if its shape is right or unknown."""
    is_union = get_origin(hint) in (Union, UnionType)
    members = {get_origin(member) or member for member in (get_args(hint) if is_union else (hint,))}
    if members == {list} and isinstance(value, dict):
        return "a list"
    if not members <= {str, int, float, bool, type(None)}:  # a list or a mapping too, or something else
        return None
    if isinstance(value, list | dict):
        return "a single value"
    if isinstance(value, bool) and bool not in members and name != "resume_from_checkpoint":  # which takes `true`
        return "a string, in quotes" if str in members else "a number"
    if value is None and type(None) not in members and default is not None:
        return "a value, or left out"
    return None


def check_env(config: dict[str, Any]) -> None:
    """Check what TRL's parser puts into the environment."""
    if "env" in config:
        env = typed(dict[str, str | int | float | bool], config["env"], field="env")
        wrong = [name for name, value in env.items() if not re.fullmatch(r"\w+", name) or "\0" in str(value)]
        if wrong:
            raise ValueError(f"`env` must hold names and values of environment variables, got {wrong}")
