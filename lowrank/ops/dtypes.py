"""What weights may be held in."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32"]
"""By torch's names."""
