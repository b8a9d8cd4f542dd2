"""`target_modules` as a list of names that means exactly the modules that it shall mean."""

from __future__ import annotations

from torch import nn


def target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """The last parts of the paths where no other module has them, else the whole paths; both as peft reads them."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    matched = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in ends}
    return ends if matched == set(paths) else sorted(paths)
