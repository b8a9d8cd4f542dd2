"""What a field takes, in words, read off its type."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

TRUE_OR_FALSE = "true or false"

_ONE: dict[object, str] = {
    bool: TRUE_OR_FALSE,
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a mapping",
}
_MANY: dict[object, str] = {bool: "truth values", int: "whole numbers", float: "numbers", str: "texts"}


def allowed(annotation: Any, rules: list[Any]) -> list[str]:
    """What a value of this type may be: ["a number above 0"], ["true or false", "one of gaussian, orthogonal"].

    Args:
        annotation: A field's type, or the type of something inside of it.
        rules: The field's bounds; numbers are held to them.
    """
    bounds = " and".join(filter(None, map(_bound, rules)))
    return [f"{kind}{bounds if 'number' in kind else ''}" for kind in dict.fromkeys(_kinds(annotation))]


def listed(words: list[str]) -> str:
    """a, b, or c."""
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])}, or {words[-1]}"


def options(annotation: Any) -> list[str]:
    """The words that a value of this type may be."""
    if get_origin(annotation) is Literal:
        return [option for option in get_args(annotation) if isinstance(option, str)]
    return [option for part in get_args(annotation) for option in options(part)]


def inside(annotation: Any, key: str | int) -> FieldInfo | Any | None:
    """What `key` leads to inside a value of this type: a type, of a model a field, None if nothing can be there."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields.get(str(key))
    if origin is dict and isinstance(key, str):
        return get_args(annotation)[1]
    if origin is list and isinstance(key, int):
        return get_args(annotation)[0]
    if origin in (Union, types.UnionType):
        return next(filter(None, (inside(part, key) for part in get_args(annotation))), None)
    if hasattr(annotation, "__metadata__"):
        return inside(get_args(annotation)[0], key)
    return None


def _kinds(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if annotation is type(None):
        return
    if origin is Literal:
        options = [option if isinstance(option, str) else str(option).lower() for option in get_args(annotation)]
        yield f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif hasattr(annotation, "__metadata__"):
        pattern = _pattern(annotation)
        rules = [rule for part in annotation.__metadata__ for rule in getattr(part, "metadata", [])]
        yield from [f"a text like {pattern}"] if pattern else allowed(get_args(annotation)[0], rules)
    elif origin is list:
        yield f"a list of {_plural(get_args(annotation)[0])}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield f"a mapping with {', '.join(annotation.model_fields)}"
    else:
        yield _ONE[origin or annotation]


def _plural(annotation: Any) -> str:
    """What a list's items are."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(_plural, get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mappings with {', '.join(annotation.model_fields)}"
    if hasattr(annotation, "__metadata__"):
        return _plural(get_args(annotation)[0])
    return _MANY[annotation]


def _bound(rule: Any) -> str:
    match rule:
        case Ge(ge=least):
            return f" of at least {least:g}"  # pyrefly: ignore[bad-argument-type]
        case Gt(gt=least):
            return f" above {least:g}"  # pyrefly: ignore[bad-argument-type]
        case Le(le=most):
            return f" of at most {most:g}"  # pyrefly: ignore[bad-argument-type]
        case Lt(lt=most):
            return f" below {most:g}"  # pyrefly: ignore[bad-argument-type]
    return ""


def _pattern(annotation: Any) -> str | None:
    """The regular expression that an annotated text must match."""
    rules = [rule for part in annotation.__metadata__ for rule in getattr(part, "metadata", [])]
    return next((str(rule.pattern).strip("^$") for rule in rules if hasattr(rule, "pattern")), None)
