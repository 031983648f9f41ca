"""Which series and labels a PromQL expression names. Enough of the grammar for our own rules and panels, no more."""

from __future__ import annotations

import re

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*("(?:[^"\\]|\\.)*")')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")


def series(expression: str) -> set[str]:
    """Names of series: ours and those that recording rules make."""
    bare = _STRING.sub('""', expression)
    return {name for name, _ in _SELECTOR.findall(bare) if name.startswith(("transformer_", "model:"))}


def matchers(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Each selector: the series and the value (or pattern) asked of each label."""
    return [
        (name, {label: value.strip('"') for label, value in _MATCHER.findall(braces)})
        for name, braces in _SELECTOR.findall(expression)
        if name.startswith(("transformer_", "model:"))
    ]


def grouping(expression: str) -> set[str]:
    """Labels that results are grouped or joined by."""
    return {label.strip() for group in _GROUPING.findall(expression) for label in group.split(",") if label.strip()}
