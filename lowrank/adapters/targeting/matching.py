"""How a name in a config means a module: at the end of its path, or as a regular expression there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def matches_end(path: str, name: str) -> bool:
    """Whether `name` is `path` or stands at its end, at a dot."""
    return path == name or path.endswith(f".{name}")


def matches_pattern(path: str, pattern: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the module at `path`: a regular expression at its end."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that matches at the end of `path` (peft's rule for rank_pattern)."""
    for pattern, value in patterns.items():
        if matches_pattern(path, pattern):
            return value
    return default
