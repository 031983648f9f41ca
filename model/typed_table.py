"""A TOML table into a dataclass: unknown keys, missing keys and wrong types are reported by name, all at once."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_table(kind: type[T], table: dict[str, Any], where: str, problems: list[str]) -> T | None:
    """``kind(**table)`` with lists as tuples and whole numbers as floats where its annotations say so.

    Args:
        where: goes before each key in a complaint; may be empty.

    Returns:
        None if something is wrong; what it is has been added to ``problems``.
    """
    hints, before = get_type_hints(kind), len(problems)
    known = fields(kind)  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    problems += [f"unknown key {prefix}{key}" for key in table if key not in {f.name for f in known}]
    values = {}
    for f in known:
        if f.name in table:
            try:
                values[f.name] = _convert(table[f.name], hints[f.name])
            except TypeError as error:
                problems.append(f"{prefix}{f.name} must be {error}, not {table[f.name]!r}")
        elif f.default is MISSING and f.default_factory is MISSING:
            problems.append(f"{prefix}{f.name} is missing")
    return kind(**values) if len(problems) == before else None


def _convert(value: Any, hint: Any) -> Any:
    """Raises TypeError with what the hint asks for, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise TypeError(f"one of {', '.join(map(repr, arguments))}")
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return _convert(value, inner)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise TypeError("a list" if arguments[-1] is ... else f"a list of {len(arguments)}")
        try:
            return tuple(_convert(item, arguments[0]) for item in value)
        except TypeError as error:
            raise TypeError(f"a list, each {error}") from error
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError({int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}[hint])
    return value
