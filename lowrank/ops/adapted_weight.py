"""W + s · L · R as a weight that is never formed: it stands in for W, and takes part in products only.

Code that multiplies with a weight need not know of the low-rank term: the stand-in is handed to it in the weight's
place, and torch gives every product that it occurs in to `__torch_function__` below, which adds the two thin products.
Whatever is no product gets the sum, formed; nothing is answered with W alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

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
        self._formed: torch.Tensor | None = None

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

    def __getitem__(self, index: Any) -> AdaptedWeight | torch.Tensor:
        """One matrix of a stack, or a stack of those that `index` (n,) picks; anything else of the formed weight."""
        if self.base.ndim != 3 or not isinstance(index, int | torch.Tensor):
            return self.formed()[index]
        if isinstance(index, torch.Tensor) and index.ndim:
            return AdaptedWeight(self.base[index], self.left[index], self.right[index], self.scale)
        if self._apart is None:  # one backward for all matrices, not a gradient of the whole stack for each
            self._apart = list(zip(self.left.unbind(0), self.right.unbind(0), strict=True))
        return AdaptedWeight(self.base[int(index)], *self._apart[int(index)], self.scale)

    def formed(self) -> torch.Tensor:
        """W + s · L · R (..., d1, d2), in W's dtype; formed once."""
        if self._formed is None:
            with torch.autocast(self.base.device.type, enabled=False):
                delta = (self.left * self.scale) @ self.right
            self._formed = self.base + delta.to(self.base.dtype)
        return self._formed

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor has."""
        return getattr(self.formed(), name)

    def __neg__(self) -> torch.Tensor:
        return -self.formed()

    def __add__(self, other: Any) -> torch.Tensor:
        return self.formed() + other

    def __sub__(self, other: Any) -> torch.Tensor:
        return self.formed() - other

    def __mul__(self, other: Any) -> torch.Tensor:
        return self.formed() * other

    def __truediv__(self, other: Any) -> torch.Tensor:
        return self.formed() / other

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        return _matmul(torch.matmul, self, other)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Products, by the function that asks for one; any other function on the formed weight."""
        product = PRODUCTS.get(func) or PRODUCTS.get(getattr(func, "_qualified_op_name", None))
        if product is not None:
            return product(func, *args, **(kwargs or {}))
        formed = tree_map_only(AdaptedWeight, AdaptedWeight.formed, [list(args), kwargs or {}])
        return func(*formed[0], **formed[1])


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


def _embedding(
    func: Callable[..., torch.Tensor], ids: torch.Tensor, weight: AdaptedWeight, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Rows of W (d1, d2): those of W itself, and of L through R."""
    if any(option is not None for option in (*args[:2], *kwargs.values()) if not isinstance(option, bool | float)):
        return func(ids, weight.formed(), *args, **kwargs)  # a padding row without gradient, rows of bounded norm
    low = F.embedding(ids, weight.left) * weight.scale
    return func(ids, weight.base, *args, **kwargs) + (low @ weight.right).to(weight.dtype)


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
    F.embedding: _embedding,
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
