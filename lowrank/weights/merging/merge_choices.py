"""What can be asked of a merge; the command line reads the names here, so nothing loads torch."""

from __future__ import annotations

from typing import Literal

MergedDtype = Literal["float32", "bfloat16", "float16", "float64"]
"""What merged weights can be stored in."""

Rounding = Literal["nearest", "stochastic"]
"""How sums become the weights' dtype."""

Tried = Literal["tensors", "answers"]
"""What of the result is tried: each changed tensor on a random vector, or what the model answers besides."""
