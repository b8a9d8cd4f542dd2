"""Modules that are run by the forward that they were built with, which may be given another one."""

from __future__ import annotations

from torch import nn


def has_own_forward(module: nn.Module) -> bool:
    """Whether neither a patch nor accelerate's hooks stand in its place."""
    return "forward" not in module.__dict__ and not hasattr(module, "_hf_hook")
