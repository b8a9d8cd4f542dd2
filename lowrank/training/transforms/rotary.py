"""Rotary positions through one kernel, on a card where it runs and in attention that rotates as the kernel does.

transformers' attention calls a function of its file for them, `apply_rotary_pos_emb`. Files differ in where it rounds
and in which numbers of a head it pairs; which of these a file does is found out on random numbers. The attention of
this one model is then run with another function under that name; files stay as they are, and so do other models.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import nn

from lowrank.ops.kernels.on_card import kernels_on, kernels_take
from lowrank.training.transforms.own_forward import has_own_forward

_NAME = "apply_rotary_pos_emb"
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]
_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10}

_Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
_Rotary: TypeAlias = Callable[..., _Pair]


def fused_rotary(model: nn.Module, device: torch.device) -> int:
    """Puts the kernel in.

    Args:
        model: A transformers model.
        device: Where it will run.

    Returns:
        How many modules rotate by it now: none on a device without the kernels. Left as they were are those whose
        forward has been replaced already, and those that rotate otherwise.
    """
    if not kernels_on(device).used:
        return 0
    count = 0
    for module in model.modules():
        function = type(module).forward
        rotary = getattr(function, "__globals__", {}).get(_NAME)
        if rotary is None or _NAME not in function.__code__.co_names or not has_own_forward(module):
            continue
        rounding = _same(rotary, device)
        if rounding is not None:
            module.__dict__["forward"] = functools.partial(_forward, module, rounding)
            count += 1
    return count


@dataclass(frozen=True)
class _Rounding:
    """Where a file's function rounds.

    Attributes:
        late: Products are in float32 and their sum alone is rounded, not each of them.
        back: To q's dtype, not to the one that it and the cosines promote to.
    """

    late: bool
    back: bool

    def rotated(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> _Pair:
        """By the kernel; heads are before tokens."""
        from lowrank.ops.kernels.rotation import rotated

        both = torch.promote_types(q.dtype, cos.dtype)
        return rotated(q, k, cos, sin, torch.float32 if self.late else both, q.dtype if self.back else both)


_ROUNDINGS = [_Rounding(late, back) for late, back in ((False, False), (False, True), (True, True))]
"""Llama's, Olmo's, ModernBERT's."""


def _forward(module: nn.Module, rounding: _Rounding, *args: Any, **kwargs: Any) -> Any:
    return _forward_of(type(module), rounding)(module, *args, **kwargs)


@functools.cache
def _forward_of(owner: type[nn.Module], rounding: _Rounding) -> FunctionType:
    """A class's own forward, in which one name stands for something else."""
    own = owner.forward
    assert isinstance(own, FunctionType)
    known = {**own.__globals__, _NAME: functools.partial(_rotary, own.__globals__[_NAME], rounding)}
    twin = FunctionType(own.__code__, known, own.__name__, own.__defaults__, own.__closure__)
    twin.__kwdefaults__ = own.__kwdefaults__
    return twin


def _rotary(
    theirs: _Rotary,
    rounding: _Rounding,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> _Pair:
    if not (unsqueeze_dim in (1, 2) and _fits(q, k, cos, sin) and kernels_take(q, k, cos, sin)):
        return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    if unsqueeze_dim == 1:
        return rounding.rotated(q, k, cos, sin)
    mine = rounding.rotated(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return mine[0].transpose(1, 2), mine[1].transpose(1, 2)


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether these are of the shapes and dtypes that the kernel is for."""
    shapes = q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and cos.shape[0] in (1, q.shape[0])
    dtypes = q.dtype == k.dtype and cos.dtype == sin.dtype and not (cos.requires_grad or sin.requires_grad)
    return shapes and dtypes and cos.shape[2] % 2 == 0 and cos.shape[2] <= q.shape[3] == k.shape[3]


@torch.no_grad()
def _same(rotary: _Rotary, device: torch.device) -> _Rounding | None:
    """What rotates as a file's function does, up to the last digit; None where nothing does."""
    if list(inspect.signature(rotary).parameters) != _PARAMETERS:
        return None
    errors = {rounding: _error(rotary, rounding, device) for rounding in _ROUNDINGS}
    best = min(errors, key=lambda rounding: errors[rounding])
    return best if errors[best] <= 1 else None


def _error(rotary: _Rotary, rounding: _Rounding, device: torch.device) -> float:
    """The largest over a few dtypes and shapes, as a part of what is tolerated."""
    return max(_part(rotary, rounding, of) for of in _tried(device))


def _tried(device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Whole heads, and heads of which half is rotated."""
    generator = torch.Generator().manual_seed(0)
    for dtype, angles in ((torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)):
        for r in (16, 8):
            shapes = [((2, 3, 5, 16), dtype), ((2, 2, 5, 16), dtype), ((1, 5, r), angles), ((1, 5, r), angles)]
            yield [torch.randn(shape, generator=generator).to(device, kind) for shape, kind in shapes]


def _part(rotary: _Rotary, rounding: _Rounding, of: list[torch.Tensor]) -> float:
    try:
        expected = rotary(*of)
    except RuntimeError:
        whole = of[2].shape[-1] == of[0].shape[-1]
        return float("inf") if whole else 0.0  # it rotates whole heads alone, so it is asked for nothing else
    found = zip(rounding.rotated(*of), expected, strict=True)
    return max(_off(got, want) for got, want in found)


def _off(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max()) / _TOLERANCE[got.dtype]
