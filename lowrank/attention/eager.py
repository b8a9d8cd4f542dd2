"""The `eager` backend: transformers' own formula, the reference. Its memory grows with the square of the length."""

from __future__ import annotations

from lowrank.attention.backend import Backend
from lowrank.attention.setting import Setting


def _refusal(setting: Setting) -> str | None:
    return None


def _implementation(setting: Setting) -> str:
    return "eager"


EAGER = Backend("eager", _refusal, _implementation, "works for every model")
