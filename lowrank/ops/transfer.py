"""From the host to a device."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device, which the host does not wait for: a card reads pinned memory by itself."""
    to_card = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if to_card else tensor).to(device, non_blocking=True)
