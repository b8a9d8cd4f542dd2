"""The ordinary tensors behind a tensor."""

from __future__ import annotations

from typing import Any

import torch


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Itself; of a tensor class that wraps others (torchao's, DTensor), those."""
    wrapper: Any = tensor
    if not hasattr(wrapper, "__tensor_flatten__"):
        return [tensor]
    return [part for name in wrapper.__tensor_flatten__()[0] for part in parts_of(getattr(wrapper, name))]
