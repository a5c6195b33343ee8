"""Sections of a checked config as dataclasses."""

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def build(kind: type[T], values: dict[str, Any]) -> T:
    """Return the dataclass `kind` filled from a checked section of the config, sections within it included."""
    hints = typing.get_type_hints(kind)
    return kind(**{field.name: _convert(hints[field.name], values[field.name]) for field in fields(kind)})


def _convert(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return build(hint, value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType and is_dataclass(arguments[0]):
        return None if value is None else build(arguments[0], value)
    if origin is tuple:
        return tuple(value)
    if origin is dict and is_dataclass(arguments[1]):
        return {name: build(arguments[1], section) for name, section in value.items()}
    if hint is float or (origin is types.UnionType and float in arguments and isinstance(value, int)):
        return value if isinstance(value, bool) else float(value)
    return value
