"""Models that another library's adapters sit in."""

from __future__ import annotations

from torch import nn

from lowrank.adapters.modules import named_modules
from lowrank.errors import InputError

_LIBRARIES = ("peft", "adapters", "loralib")


def refuse_foreign(model: nn.Module) -> None:
    """Raises InputError for a model that carries adapters which are not lowrank's: two libraries in one forward."""
    for path, module in named_modules(model):
        library = type(module).__module__.partition(".")[0]
        if library in _LIBRARIES:
            where = f"its {path} is" if path else "it is"
            raise InputError(
                f"this {type(model).__name__} carries adapters of {library}: {where} a {type(module).__name__}",
                fix="Save that adapter with its own library and lowrank.load it into the plain base; or merge it there "
                "first (peft: model.merge_and_unload()).",
            )
