"""What gradient checkpointing can be besides true and false; the config reads it, so nothing loads torch."""

from __future__ import annotations

from typing import Literal

RecomputeMode = Literal["selective", "offload"]
