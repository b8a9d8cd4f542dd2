"""From a file to a `RunConfig`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from lowrank.config.assignments import override
from lowrank.config.checking import check
from lowrank.config.contradictions import without_effect
from lowrank.config.document import Problem, document_of, read_document
from lowrank.config.run_config import RunConfig
from lowrank.config.yamlcore import CoreDumper
from lowrank.errors import InputError
from lowrank.paths import expanded

CONFIG = "config.yaml"
"""The name of a run's config in its folder."""


class ConfigError(InputError):
    """A config with mistakes.

    Attributes:
        problems: All of them.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,)


def load_config(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's config.

    Args:
        path: A YAML file; a run's folder, for the config that it was run with; or the sections as a mapping. Relative
            paths inside of it are relative to the current folder, not to the file; here and there `~` and `$NAME` are
            replaced.
        overrides: `section.key=value` each (`lowrank.config.assignments`); they stand before what the file says.

    Raises:
        ConfigError: whatever is wrong, all of it, each with its line.
    """
    document = document_of(path) if isinstance(path, Mapping) else read_document(_file(Path(expanded(path))))
    if document.problems and not document.values:
        raise ConfigError(document.problems)
    for assignment in overrides:
        override(document, assignment)
    config, problems = check(document)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _file(path: Path) -> Path:
    return path / CONFIG if (path / CONFIG).is_file() else path


def dump_config(config: RunConfig) -> str:
    """The config as YAML, every default that has an effect written out; `load_config` reads it back as the same."""
    idle = {tuple(one.keys[0].split(".")) for one in without_effect(config)}
    values = {}
    for section in type(config).model_fields:
        part = getattr(config, section)
        if part is not None:
            written = _values(part)
            values[section] = {key: value for key, value in written.items() if (section, key) not in idle}
    return yaml.dump(values, Dumper=CoreDumper, sort_keys=False, allow_unicode=True)


def _values(section: BaseModel) -> dict[str, Any]:
    """A section's fields, `method` first, without those that are None by default anyway."""
    fields = type(section).model_fields
    values = section.model_dump(mode="json")
    first = {"method": values["method"]} if "method" in values else {}
    return first | {key: value for key, value in values.items() if value is not None or fields[key].default is not None}
