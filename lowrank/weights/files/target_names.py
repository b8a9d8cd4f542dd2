"""`target_modules` as a list of names that means exactly the modules that it shall mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.targeting.matching import matches_end
from lowrank.adapters.targeting.targets import ALL_LINEAR


def target_names(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The last parts of the paths where no other module has them, else the whole paths; both as peft reads them.

    Where a whole path is another's end ("head" beside "body.head"), a regular expression says which is meant.
    """
    modules = [path for path, _ in model.named_modules()]
    for names in ({path.rpartition(".")[2] for path in paths}, set(paths)):
        if {path for path in modules if not names.isdisjoint(_ends(path))} == set(paths):
            return sorted(names)
    return _exactly(paths)


def whole_names(modules: Iterable[str], names: list[str] | None) -> list[str] | None:
    """`modules_to_save`: in full where peft, to whom an end need not begin at a dot, would take others as well."""
    if not names:
        return names
    meant = [path for path in modules if any(matches_end(path, name) for name in names)]
    taken = [path for path in modules if path.endswith(tuple(names))]
    return names if len(meant) == len(taken) else sorted(meant)


def targets_of(configs: Sequence[AdapterConfig], paths: list[str]) -> list[str] | str:
    """The targets of an adapter on `paths` that is made of others.

    The last parts of the names, where those meant all modules of the name; else the whole names, and those as a regular
    expression where one of the others had one.
    """
    if any(isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR for config in configs):
        return _exactly(paths)
    named: set[str] = set()
    for config in configs:
        targets = config.target_modules
        if not isinstance(targets, list) or config.layers_to_transform is not None or config.exclude_modules:
            return sorted(paths)
        named.update(targets)
    ends = {path.rpartition(".")[2] for path in paths}
    return sorted(ends if ends <= named else paths)


def _ends(path: str) -> list[str]:
    """What names a module in a list of targets: its path, and every end of it at a dot."""
    parts = path.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _exactly(paths: list[str]) -> str:
    return "|".join(re.escape(path) for path in sorted(paths))
