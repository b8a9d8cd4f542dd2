"""pydantic's findings in words: the key as the user wrote it, what is allowed, and what they may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from lowrank.config.contradictions import Contradiction, ContradictionsError
from lowrank.config.document import Document, KeyPath, Problem, dotted
from lowrank.config.keys import field_at, meaning, section_model, stands_for, unknown
from lowrank.config.run_config import RunConfig
from lowrank.config.sections import adapter_sections
from lowrank.config.type_words import TRUE_OR_FALSE, allowed, listed, options

Found = dict[KeyPath, Problem]

QLORA = "QLoRA is LoRA over a quantised base: adapter.method: lora and quantization.load_in_4bit: true"


def problems(document: Document, error: ValidationError) -> Found:
    """One problem for each key that is wrong."""
    found: Found = {}
    for detail in error.errors():
        if isinstance(cause := detail.get("ctx", {}).get("error"), ContradictionsError):
            found |= dict(contradiction(document, one) for one in cause.found)
            continue
        path, what = _told(detail, document)
        found.setdefault(path, Problem(document.place(path), dotted(path), what))
    deeper = {path[:depth] for path in found for depth in range(2, len(path))}
    named_otherwise = {path for path in found if _is_named_otherwise(path, found, document)}
    return {path: problem for path, problem in found.items() if path not in deeper | named_otherwise}


def contradiction(document: Document, found: Contradiction) -> tuple[KeyPath, Problem]:
    """A contradiction as a problem, at the place of its first key."""
    path: KeyPath = tuple(found.keys[0].split("."))
    return path, Problem(document.place(path), found.keys[0], found.why)


def traps(document: Document) -> Found:
    """What pydantic lets pass, though nobody can mean it: true for 1, and the word None for no value."""
    found: Found = {}
    for path, text in document.written.items():
        field, value = field_at(path, document), document.value(path)
        if field is None:
            continue
        if isinstance(value, bool) and not {TRUE_OR_FALSE, "true"}.intersection(allowed(*field)):
            found[path] = Problem(document.place(path), dotted(path), _mistyped(path, document))
        elif text == "None" and NoneType in get_args(field[0]):
            what = "None is a text in YAML; write null, or leave the key out"
            found[path] = Problem(document.place(path), dotted(path), what)
    return found


def _is_named_otherwise(path: KeyPath, found: Found, document: Document) -> bool:
    """Whether a key is only missing because it is there misspelt, or under another tool's name."""
    if not found[path].what.startswith("is missing"):
        return False
    strangers = [other for other in found if other in document.places and _is_unknown(other, document)]
    return any(stands_for(path, other, document) for other in strangers)


def _is_unknown(path: KeyPath, document: Document) -> bool:
    return field_at(path, document) is None if len(path) > 1 else path[0] not in RunConfig.model_fields


def _told(detail: Mapping[str, Any], document: Document) -> tuple[KeyPath, str]:
    location = detail["loc"]
    path: KeyPath = ()
    for key in location:  # the names of a union's members are no keys of the user's
        path = (*path, key) if (*path, key) in document.places else path
    match detail["type"]:
        case "missing":
            return (*path, location[-1]), f"is missing: {meaning((*path, location[-1]), document)}"
        case "extra_forbidden":
            return path, unknown(path, document)
        case "union_tag_invalid":
            return ("adapter", "method"), _no_method(document)
        case "value_error":
            return _blamed(path, str(detail["ctx"]["error"]), document)
    return path, _mistyped(path, document) if len(path) > 1 else _no_section(str(path[0]), document)


def _blamed(path: KeyPath, why: str, document: Document) -> tuple[KeyPath, str]:
    """A section's own check: where its message begins with a key of the section, that key is where it stands."""
    first, _, rest = why.partition(" ")
    known = len(path) == 1 and first in section_model(str(path[0]), document.values).model_fields
    return ((*path, first), re.sub(r"^\((.+?)\)", r"\1", rest)) if known else (path, why)


def _mistyped(path: KeyPath, document: Document) -> str:
    field = field_at(path, document)
    assert field is not None, f"a wrong type at {dotted(path)}, which is no field"
    words, value = listed(allowed(*field)), document.value(path)
    if value is None:
        return f"is empty; it takes {words}"
    told = f"{document.shown(path)} is not {words}"
    near = difflib.get_close_matches(str(value), options(field[0]), n=1)
    if near:
        told += f"; did you mean {near[0]}?"
    elif isinstance(value, (bool, int, float)) and "a text" in words:
        told += f' (in quotes it is one: "{document.shown(path)}")'
    return told


def _no_method(document: Document) -> str:
    given = document.value(("adapter", "method"))
    if given is None:
        return f"is empty; it is one of {', '.join(adapter_sections())}"
    if isinstance(given, str) and re.fullmatch("q(lo|do)ra", given.lower()):
        return QLORA
    return f"{document.shown(('adapter', 'method'))} is no method; it is one of {', '.join(adapter_sections())}"


def _no_section(section: str, document: Document) -> str:
    value, shown = document.value((section,)), document.shown((section,))
    if section == "adapter" and value is None:
        return f"is empty; name a method: {', '.join(adapter_sections())} (full trains every weight)"
    if section == "adapter" and str(value).lower() == "qlora":
        return QLORA
    if value is None:
        return "is empty; its keys go below it, one a line"
    first = {"model": "name_or_path", "adapter": "method", "data": "train"}.get(section)
    example = f": {section}.{first}: {value}" if first and isinstance(value, str) else ""
    return f"{shown} is no section; its keys go below it, one a line{example}"
