"""Which keys there are, and what a person is told about one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lowrank.config.document import Document, KeyPath
from lowrank.config.run_config import RunConfig
from lowrank.config.sections import adapter_sections
from lowrank.config.synonyms import ABSENT, SYNONYMS
from lowrank.config.type_words import inside

SECTIONS: dict[str, type[BaseModel]] = {
    name: next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    for name, field in RunConfig.model_fields.items()
    if name != "adapter"
    for parts in [get_args(field.annotation) or (field.annotation,)]
}
"""The other sections' models."""


def section_model(name: str, values: Mapping[str, Any]) -> type[BaseModel]:
    """The model of a section; the adapter's by its method, lora's where that is none."""
    if name != "adapter":
        return SECTIONS[name]
    adapter = values.get("adapter")
    method = adapter.get("method") if isinstance(adapter, dict) else None
    methods = adapter_sections()
    return methods[method] if isinstance(method, str) and method in methods else methods["lora"]


def field_at(path: KeyPath, document: Document) -> tuple[Any, list[Any]] | None:
    """Type and bounds of what stands at `path`, None for a section or a key that is not known."""
    if len(path) < 2 or not isinstance(path[0], str) or path[0] not in RunConfig.model_fields:
        return None
    found = _found(path, document)
    if found is None:
        return None
    return (found.annotation, found.metadata) if isinstance(found, FieldInfo) else (found, [])


def meaning(path: KeyPath, document: Document) -> str:
    """The first sentence of a field's description, without its full stop."""
    field = RunConfig.model_fields[str(path[0])] if len(path) == 1 else _found(path, document)
    text = (field.description or "").partition(".")[0] if isinstance(field, FieldInfo) else ""
    return text[:1].lower() + text[1:]


def _found(path: KeyPath, document: Document) -> Any:
    found: Any = section_model(str(path[0]), document.values)
    for key in path[1:]:
        found = inside(found.annotation if isinstance(found, FieldInfo) else found, key)
    return found


def unknown(path: KeyPath, document: Document) -> str:
    """What to say about a key that is not known where it stands."""
    if path == ("sweep",):
        return "is a section of what `lowrank sweep` is given; take that verb, or leave the section out"
    name, here = str(path[-1]), _names(path[:-1], document)
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.6)
    if len(path) <= 2 and (told := _known_elsewhere(name, str(path[0]), document)):
        return told
    if near:
        return f"is not known; did you mean {near[0]}?"
    far = difflib.get_close_matches(name, [key for _, key in _all(document)], n=1, cutoff=0.8)
    if far:
        section = next(section for section, key in _all(document) if key == far[0])
        return f"is not known; did you mean {section}.{far[0]}?"
    return f"is not known; known here: {', '.join(here)}"


def _known_elsewhere(name: str, asked: str, document: Document) -> str | None:
    """What to say about a key that other tools, other sections or other methods have."""
    if name in SYNONYMS:
        return f"is {SYNONYMS[name]} here"
    if name in ABSENT:
        return f"is not needed here: {ABSENT[name]}"
    owners = [f"`{section}:`" for section, key in _all(document) if key == name and section != asked]
    if owners:
        return f"belongs under {' or '.join(owners)}"
    methods = [method for method, model in adapter_sections().items() if name in model.model_fields]
    return f"belongs to adapter.method: {' or '.join(methods)}" if methods else None


def stands_for(path: KeyPath, other: KeyPath, document: Document) -> bool:
    """Whether the unknown key at `other` is what the user calls the missing key at `path`."""
    told = unknown(other, document)
    if len(path) == 1 and (f"`{path[0]}:`" in told or told.startswith(f"is {path[0]}.")):
        return True  # a key of the section that is missing
    names = [".".join(map(str, path)), *([str(path[-1])] if other[:-1] == path[:-1] else [])]
    return any(told in (f"is {name} here", f"is not known; did you mean {name}?") for name in names)


def _names(path: KeyPath, document: Document) -> list[str]:
    """The keys that may stand below `path`."""
    if not path:
        return list(RunConfig.model_fields)
    if len(path) == 1:
        return list(section_model(str(path[0]), document.values).model_fields)
    found = field_at(path, document)
    parts = (found[0], *get_args(found[0])) if found else ()
    return [name for part in parts if hasattr(part, "model_fields") for name in part.model_fields]


def _all(document: Document) -> list[tuple[str, str]]:
    """Every (section, key) that this config could have."""
    models = {name: section_model(name, document.values) for name in RunConfig.model_fields}
    return [(section, key) for section, model in models.items() for key in model.model_fields]
