"""The factors of every module in an adapter's files, as two matrices and a scale, and back to peft's names."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from lowrank.adapters.methods.lora import LORA_A, LORA_B
from lowrank.adapters.multihead import OUT_PROJ
from lowrank.adapters.registry import method_of
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank
from lowrank.weights.arithmetic.factors import Product
from lowrank.weights.files.adapter_file import AdapterFile, refuse_taken_out, shorten
from lowrank.weights.files.factor_names import factor_of
from lowrank.weights.files.factor_values import flat_factors

SAVE_AS_LORA = "Load it into its base and save it as an ordinary LoRA first: lowrank.save(..., as_lora=True)."


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's factors.

    Attributes:
        path: The module's path.
        A: (r, in), without the scale.
        B: (out, r).
        scale: s of ΔW = s · B · A.
        shape_A, shape_B: As a LoRA's file has them (a convolution's have more dimensions).
        embedding: Whether they are an embedding's, which files name otherwise.
        dtype: In the file.
    """

    path: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    embedding: bool
    dtype: torch.dtype

    @property
    def product(self) -> Product:
        """ΔW, the scale folded into A."""
        return Product(self.A * self.scale, self.B)

    def with_factors(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        """The same module with other factors (scale 1), in float32 where the file's dtype would round them."""
        exact = all(torch.equal(factor.to(self.dtype).float(), factor) for factor in (A, B))
        return replace(self, A=A, B=B, scale=1.0, dtype=self.dtype if exact else torch.float32)

    def in_file(self) -> dict[str, torch.Tensor]:
        """The tensors under peft's names; the scale is the config's business."""
        A = self.A.reshape(-1, *self.shape_A[1:]).to(self.dtype)
        B = self.B.reshape(self.shape_B[0], -1, *self.shape_B[2:]).to(self.dtype)
        pairs = ((LORA_A, A), (LORA_B, B))
        return {f"{self.path}.{factor.on_table if self.embedding else factor.in_file}": each for factor, each in pairs}


def read_factors(adapter: AdapterFile, skip: frozenset[str] = frozenset()) -> dict[str, Factors]:
    """Every module's factors, in float32.

    Args:
        adapter: The adapter.
        skip: Tensors that the caller takes care of.

    Raises:
        InputError: The adapter holds more than factors (magnitudes, biases, whole modules), or they do not go together.
    """
    refuse_taken_out(adapter)
    method = method_of(adapter.config)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    others, tables = [], set()
    known = {factor.name for factor in method.factors if factor.side != "row"}
    for name in (name for name in adapter.tensors if name not in skip):
        factor = factor_of(name)
        if factor is None or factor.name not in known or factor.path.endswith(f".{OUT_PROJ}"):
            others.append(name)
        else:
            found[factor.path][factor.name] = name
            tables |= {factor.path} if factor.on_table else set()
    if getattr(adapter.config, "target_parameters", None):
        others.append("target_parameters")
    if method.of_base:
        raise InputError(
            f"the factors of method {method.name} say what they stand for beside their base alone, "
            "and that cannot be done without it",
            where=str(adapter.path),
            fix=SAVE_AS_LORA,
        )
    if others or not method.composes:
        raise InputError(
            f"the adapter is more than a low-rank sum (method {method.name}; {shorten(others)}), "
            "and that cannot be done with its factors",
            where=str(adapter.path),
            fix="Merge it into its base instead, and extract a LoRA from the result.",
        )
    return {path: _read(adapter, path, names, path in tables) for path, names in found.items()}


def _read(adapter: AdapterFile, path: str, names: dict[str, str], embedding: bool) -> Factors:
    method = method_of(adapter.config)
    if names.keys() != {factor.name for factor in method.factors}:
        raise InputError(f"the factors of {path} are not complete: {', '.join(sorted(names))}", where=str(adapter.path))
    shapes = {name: tuple(adapter.tensors[full].shape) for name, full in names.items()}
    apart = InputError(
        f"{path} has factors {' and '.join(map(str, shapes.values()))}, which do not go together",
        where=str(adapter.path),
    )
    if any(len(shape) < 2 for shape in shapes.values()):
        raise apart
    try:
        term = method.low_rank(flat_factors(adapter, names), method.scale(adapter.config, path), None)
    except RuntimeError:  # torch's, of sizes that cannot be multiplied
        raise apart from None
    sides = {factor.side: shapes[factor.name] for factor in method.factors}
    shape_A, shape_B = sides.get("in", tuple(term.A.shape)), sides.get("out", tuple(term.B.shape))
    if len(shape_A) > 2 and shape_A[0] > shape_B[1] > 0 and shape_A[0] % shape_B[1] == 0:
        raise InputError(
            f"{path} is a convolution with {shape_A[0] // shape_B[1]} groups, and its factors are no product B · A",
            where=str(adapter.path),
        )
    if len(shape_A) == 2 and term.A.shape[0] == term.B.shape[1] == 0:  # every rank pruned: ΔW = 0, as readers take it
        shape_A, shape_B = (1, shape_A[1]), (shape_B[0], 1)
        term = LowRank(torch.zeros(shape_A), torch.zeros(shape_B), term.scale)
    if shape_A[0] != shape_B[1] or 0 in (*shape_A, *shape_B):
        raise apart
    dtype = adapter.tensors[names[method.factors[0].name]].torch_dtype
    return Factors(path, term.A, term.B, term.scale, shape_A, shape_B, embedding, dtype)
