"""What transformers asks a card about each pack, and the host knows: whether the position_ids of a row restart.

`find_packed_sequence_indices` numbers the sequences of a row on the card, and waits to learn whether there are several.
Of position_ids that are announced to restart the numbers are made, and nothing is waited for.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from transformers import masking_utils

# By their id; they are kept, so that no other tensor has it.
_RESTARTING: dict[int, torch.Tensor] = {}


def announce(position_ids: torch.Tensor) -> None:
    """Position_ids that restart, or of which it does not matter whether they do, until `forget`."""
    found: Any = masking_utils.find_packed_sequence_indices
    if not hasattr(found, "__wrapped__"):
        masking_utils.find_packed_sequence_indices = _known_first(found)
    _RESTARTING[id(position_ids)] = position_ids


def forget(position_ids: torch.Tensor) -> None:
    """They are asked about again."""
    _RESTARTING.pop(id(position_ids), None)


def _known_first(find: Any) -> Any:
    @wraps(find)
    def indices(position_ids: torch.Tensor) -> torch.Tensor | None:
        if _RESTARTING.get(id(position_ids)) is not position_ids:
            return find(position_ids)
        return (position_ids.diff(prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    return indices
