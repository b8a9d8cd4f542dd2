"""W + s · L · R as a weight that is never formed: it stands in for W, and takes part in products only.

Code that multiplies with a weight need not know of the low-rank term: the stand-in is handed to it in the weight's
place, and torch gives every product that it occurs in to `__torch_function__` below, which adds the two thin products.
Whatever is no product is refused, never answered with W alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lowrank.errors import InputError
from lowrank.ops.lora_linear import lora_linear
from lowrank.ops.low_rank import LowRank


class AdaptedWeight:
    """W + scale · left · right, for one matrix or a stack of them (experts).

    Args:
        base: W (..., d1, d2).
        left: (..., d1, r); of any floating dtype, cast to the input's in a product.
        right: (..., r, d2).
        scale: s.
    """

    def __init__(self, base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
        self.base, self.left, self.right, self.scale = base, left, right, scale
        self._apart: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def shape(self) -> torch.Size:
        """W's shape."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """W's dtype."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """W's device."""
        return self.base.device

    def data_ptr(self) -> int:
        """W's address: transformers looks at its alignment."""
        return self.base.data_ptr()

    def transpose(self, first: int, second: int) -> AdaptedWeight:
        """Each matrix transposed: (L · R)ᵀ = Rᵀ · Lᵀ."""
        assert {first % self.base.ndim, second % self.base.ndim} == {self.base.ndim - 2, self.base.ndim - 1}
        return AdaptedWeight(self.base.mT, self.right.mT, self.left.mT, self.scale)

    def float(self) -> AdaptedWeight:
        """In float32."""
        return AdaptedWeight(self.base.float(), self.left.float(), self.right.float(), self.scale)

    def __getitem__(self, index: int | torch.Tensor) -> AdaptedWeight:
        """One matrix of a stack, or a stack of those that `index` (n,) picks."""
        if isinstance(index, torch.Tensor) and index.ndim:
            return AdaptedWeight(self.base[index], self.left[index], self.right[index], self.scale)
        if self._apart is None:  # one backward for all matrices, not a gradient of the whole stack for each
            self._apart = list(zip(self.left.unbind(0), self.right.unbind(0), strict=True))
        return AdaptedWeight(self.base[int(index)], *self._apart[int(index)], self.scale)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a weight that carries an adapter is there for products, and was asked for {name!r}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """Products, by the function that asks for one."""
        product = PRODUCTS.get(func) or PRODUCTS.get(getattr(func, "_qualified_op_name", None))
        if product is None:
            raise InputError(
                f"the model calls {getattr(func, '__name__', func)} on a weight that carries an adapter, and only "
                "matrix products are known there",
                fix='For experts, model.set_experts_implementation("grouped_mm") takes the usual products.',
            )
        return product(func, *args, **(kwargs or {}))


def adapted_weight_reference(weight: AdaptedWeight) -> torch.Tensor:
    """The same, formed: W + s · L · R (..., d1, d2)."""
    return weight.base + weight.scale * (weight.left @ weight.right)


def _linear(
    func: Callable[..., torch.Tensor], x: torch.Tensor, weight: AdaptedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., d2) · (W + s·L·R)ᵀ + bias -> (..., d1)."""
    return lora_linear(x, weight.base, bias, LowRank(weight.right, weight.left, weight.scale))


def _matmul(
    func: Callable[..., torch.Tensor], first: torch.Tensor | AdaptedWeight, second: torch.Tensor | AdaptedWeight
) -> torch.Tensor:
    """The product of an input and a weight, in either order, one or a stack of each."""
    if isinstance(first, AdaptedWeight):
        assert isinstance(second, torch.Tensor)
        low = func(first.right.to(second.dtype), second) * first.scale
        return func(first.base, second).add_(func(first.left.to(second.dtype), low))
    assert isinstance(second, AdaptedWeight)
    if second.base.ndim == 2:
        return _linear(func, first, second.transpose(0, 1))
    low = func(first, second.left.to(first.dtype)) * second.scale
    return func(first, second.base).add_(func(low, second.right.to(first.dtype)))


def _grouped(
    func: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: AdaptedWeight,
    offs: torch.Tensor,
    bias: None = None,
    out_dtype: None = None,
) -> torch.Tensor:
    """x (n, d1), its rows sorted by group, each group with its own matrix (d1, d2) -> (n, d2); offs are their ends."""
    assert bias is None, "torch takes none yet"
    assert out_dtype is None, "transformers gives none"
    missing = -weight.left.shape[-1] % (16 // x.element_size())  # torch's product wants rows of whole 16 bytes
    left = F.pad(weight.left.to(x.dtype), (0, missing)) if missing else weight.left.to(x.dtype)
    right = F.pad(weight.right.to(x.dtype), (0, 0, 0, missing)) if missing else weight.right.to(x.dtype)
    low = func(x, left, offs=offs) * weight.scale
    return func(x, weight.base, offs=offs).add_(func(low, right, offs=offs))


PRODUCTS: dict[object, Callable[..., torch.Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    "transformers::grouped_mm_fallback": _grouped,  # in the place of torch's, where that does not serve
}
"""The products that are known, by torch's function or an operator's name."""

if hasattr(torch, "_grouped_mm"):
    PRODUCTS[torch._grouped_mm] = _grouped


@functools.cache
def teach_compiler() -> None:
    """Has `torch.compile` hand `F.grouped_mm` to the stand-in, as eager mode does.

    The compiler looks for `__torch_function__` at calls of public functions only, and the one underneath is private.
    """
    if not hasattr(F, "grouped_mm"):
        return

    @torch.compiler.substitute_in_graph(F.grouped_mm, skip_signature_check=True)
    def grouped_mm(
        mat_a: torch.Tensor,
        mat_b: torch.Tensor | AdaptedWeight,
        *,
        offs: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        if isinstance(mat_b, AdaptedWeight):
            return PRODUCTS[torch._grouped_mm](torch._grouped_mm, mat_a, mat_b, offs, bias, out_dtype)
        return torch._grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
