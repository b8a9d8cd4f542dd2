"""Where the kernels run: on CUDA cards that Triton compiles for, once they have been tried there against torch.

A card on which they cannot be compiled, or say something else, computes as all other devices do; `kernels_on` says why.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from lowrank.errors import first_line

WIDEST = 16384
"""The longest row that is normed by a kernel: more does not fit into a program's registers."""

_DEVICE = "cuda"
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_CAPABILITY = 8, 0
"""The least that Triton supports."""


@dataclass(frozen=True)
class KernelChoice:
    """Whether a device computes with the kernels, and why (not)."""

    used: bool
    why: str

    def __str__(self) -> str:
        return f"{'own' if self.used else 'none'}: {self.why}"


def kernels_take(*tensors: torch.Tensor) -> bool:
    """Whether the kernels compute with these: plain tensors of up to 32 bits, all on one card where they run."""
    if not all(tensor.device.type == _DEVICE for tensor in tensors):
        return False
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype in _DTYPES for t in tensors)
    return plain and len({t.device for t in tensors}) == 1 and kernels_on(tensors[0].device).used


@functools.cache
def kernels_on(device: torch.device) -> KernelChoice:
    """What a device computes with; a card is tried the first time, which takes a few seconds where Triton has to
    compile."""
    reason = _missing(device)
    return _tried(device) if reason is None else KernelChoice(False, reason)


@functools.cache
def _tried(device: torch.device) -> KernelChoice:
    try:
        from lowrank.ops.kernels.trial import disagreement

        reason = disagreement(device)
    except Exception as error:  # of a compiler, a driver, a linker: whatever it is, torch's own operations remain
        reason = f"they do not run here: {first_line(error)}"
    return KernelChoice(reason is None, reason or "they agree with torch on this card")


def _missing(device: torch.device) -> str | None:
    if device.type != _DEVICE or torch.version.hip is not None or not torch.cuda.is_available():
        return "they are made for CUDA"
    if find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= _CAPABILITY else "Triton needs a card of compute capability {}.{}".format(*_CAPABILITY)
