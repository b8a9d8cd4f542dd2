"""The attention backends' names, in the order of the documentation; the config reads them, so nothing loads torch."""

from __future__ import annotations

BACKEND_NAMES = ("eager", "sdpa", "segments", "flash", "flex", "paged")
