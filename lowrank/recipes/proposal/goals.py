"""What can come first in a proposal where two things cannot both be had; the command line reads it without torch."""

from __future__ import annotations

from typing import Literal

Goal = Literal["quality", "memory", "speed"]
