"""What a transformers mask function is made of.

transformers builds each mask as a function of two positions that closes over simpler ones (causal, window, packed).
Who takes a short cut past such a function, as kernels that know "causal" and "window" alone do, must know that nothing
else is in it: image tokens that see one another both ways, chunks, what a caller has added. To look at the names of the
parts costs no work on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

WINDOW = "sliding_window_overlay"
CAUSAL = frozenset(
    {
        "causal_mask_function",
        WINDOW,
        "and_masks",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
        "padding_mask_function",
    }
)
"""Parts of masks that are causal within windows, segments and padded rows, and nothing else."""

CHUNKS = frozenset({"chunked_overlay"})
"""Parts of masks that end a span at the border of a chunk."""

BOTH_WAYS = frozenset({"bidirectional_mask_function", "sliding_window_bidirectional_overlay"})
"""Parts of masks of layers that are not causal."""


def parts_of(mask_function: Callable[..., Any]) -> frozenset[str]:
    """Names of all parts: of transformers' own the name of what makes them, of others their full name."""
    return frozenset(map(_name, _parts(mask_function)))


def _parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The function and, as deep as they go, all that it closes over."""
    yield mask_function
    for cell in getattr(mask_function, "__closure__", None) or ():
        held = cell.cell_contents
        for inner in held if isinstance(held, (tuple, list)) else (held,):
            if callable(inner) and not isinstance(inner, type):
                yield from _parts(inner)


def _name(part: Callable[..., Any]) -> str:
    module, name = getattr(part, "__module__", ""), getattr(part, "__qualname__", repr(part))
    return name.partition(".<locals>")[0] if module == "transformers.masking_utils" else f"{module}.{name}"
