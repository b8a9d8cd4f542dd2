"""A run that goes on from an adapter: what trains is that adapter, with its own method, rank and targets."""

from __future__ import annotations

from pathlib import Path

from lowrank.adapters import METHODS
from lowrank.config import RunConfig
from lowrank.config.sections import adapter_sections, default_section
from lowrank.errors import InputError
from lowrank.recipes.parts.opened import adapter_folder
from lowrank.weights.files.adapter_file import open_adapter


def with_start(config: RunConfig) -> RunConfig:
    """The config, whose section `adapter` says what the adapter is that it goes on from; as it was where it names none.

    Raises:
        InputError: there is no such adapter, the section says something else, or the method cannot be gone on with.
    """
    if config.model.adapter is None:
        return config
    file = open_adapter(folder_of(config.model.adapter))
    name = file.config.method_name
    if spans := METHODS[name].spans_run:
        raise InputError(f"{config.model.adapter} is {name}: {spans}", where="model.adapter", fix="Take another one.")
    own = adapter_sections()[name].model_validate({"method": name, **file.config.model_dump()})
    if config.adapter not in (own, default_section()):
        raise InputError(
            f"the section adapter is not what {config.model.adapter} is, and that is what trains",
            where="model.adapter",
            fix="Leave the section adapter out, or begin with an adapter of its own: leave model.adapter out.",
        )
    return config.model_copy(update={"adapter": own})


def folder_of(adapter: str) -> Path:
    """Where the adapter lies that a run goes on from; InputError: there is none."""
    folder = adapter_folder(adapter)
    if folder is None:
        raise InputError(
            f"there is no adapter {adapter}", where="model.adapter", fix="Give the folder of a run or an adapter."
        )
    return folder
