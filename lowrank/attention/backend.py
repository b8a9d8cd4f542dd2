"""What an attention backend is to the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowrank.attention.setting import Setting


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: What users write.
        refusal: Why it cannot serve a setting exactly, as the end of "... cannot serve it: "; None: it can.
        implementation: transformers' name for it in a setting that it serves.
        praise: What it is good at, for the message that says why it was chosen.
    """

    name: str
    refusal: Callable[[Setting], str | None]
    implementation: Callable[[Setting], str]
    praise: str
