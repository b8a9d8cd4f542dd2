"""How adapters can become one; the command line reads the names here, so nothing loads torch."""

from __future__ import annotations

from typing import Literal

ComposeMethod = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]

MajoritySign = Literal["total", "frequency"]
"""How TIES elects a sign: by the sum of the values, or by their number."""
