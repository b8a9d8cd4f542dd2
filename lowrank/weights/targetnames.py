"""`target_modules` as a list of names that means exactly the modules that it shall mean."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lowrank.adapters.config import AdapterConfig


def target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The last parts of the paths where no other module has them, else the whole paths; both as peft reads them."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    matched = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in ends}
    return ends if matched == set(paths) else sorted(paths)


def targets_of(configs: Sequence[AdapterConfig], paths: list[str]) -> list[str]:
    """The targets of an adapter on `paths` that is made of others.

    The last parts of the names, where those meant all modules of the name; else the whole names.
    """
    named: set[str] = set()
    for config in configs:
        targets = config.target_modules
        if not isinstance(targets, list) or config.layers_to_transform is not None or config.exclude_modules:
            return sorted(paths)
        named.update(targets)
    ends = {path.rpartition(".")[2] for path in paths}
    return sorted(ends if ends <= named else paths)
