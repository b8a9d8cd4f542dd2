"""The factors of every module in an adapter's files, as two matrices and a scale, and back to peft's names."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from lowrank.adapters.multihead import OUT_PROJ
from lowrank.adapters.registry import METHODS
from lowrank.errors import InputError
from lowrank.weights.arithmetic.factors import Product
from lowrank.weights.files.adapter_file import FACTOR, AdapterFile, refuse_taken_out, shorten

_NEEDED = {"lora": {"lora_A", "lora_B"}, "adalora": {"lora_A", "lora_B", "lora_E"}}


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's factors.

    Attributes:
        path: The module's path.
        A: (r, in), without the scale; AdaLoRA's Λ folded in.
        B: (out, r).
        scale: s of ΔW = s · B · A.
        shape_A, shape_B: As in the file (a convolution's have more dimensions).
        embedding: Whether peft's file names them `lora_embedding_A` and `lora_embedding_B`.
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
        if self.embedding:
            return {f"{self.path}.lora_embedding_A": A, f"{self.path}.lora_embedding_B": B}
        return {f"{self.path}.lora_A.weight": A, f"{self.path}.lora_B.weight": B}


def read_factors(adapter: AdapterFile, skip: frozenset[str] = frozenset()) -> dict[str, Factors]:
    """Every module's factors, in float32.

    Args:
        adapter: The adapter.
        skip: Tensors that the caller takes care of.

    Raises:
        InputError: The adapter holds more than factors (magnitudes, biases, whole modules), or they do not go together.
    """
    refuse_taken_out(adapter)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    others = []
    for name in (name for name in adapter.tensors if name not in skip):
        match = FACTOR.fullmatch(name)
        if match is None or match["name"] == "lora_magnitude_vector" or match["path"].endswith(f".{OUT_PROJ}"):
            others.append(name)
        else:
            found[match["path"]][match["name"]] = name
    if getattr(adapter.config, "target_parameters", None):
        others.append("target_parameters")
    if others or adapter.config.method_name not in _NEEDED:
        raise InputError(
            f"the adapter is more than a low-rank sum (method {adapter.config.method_name}; {shorten(others)}), "
            "and that cannot be done with its factors",
            where=str(adapter.path),
            fix="Merge it into its base instead, and extract a LoRA from the result.",
        )
    return {path: _read(adapter, path, names) for path, names in found.items()}


def _read(adapter: AdapterFile, path: str, names: dict[str, str]) -> Factors:
    embedding = any("embedding" in bare for bare in names)
    bare = {name.replace("lora_embedding_", "lora_"): full for name, full in names.items()}
    if bare.keys() != _NEEDED[adapter.config.method_name]:
        raise InputError(f"the factors of {path} are not complete: {', '.join(sorted(names))}", where=str(adapter.path))
    tensors = {name: adapter.read(full) for name, full in bare.items()}
    shape_A, shape_B = tuple(tensors["lora_A"].shape), tuple(tensors["lora_B"].shape)
    if len(shape_A) > 2 and shape_A[0] > shape_B[1] > 0 and shape_A[0] % shape_B[1] == 0:
        raise InputError(
            f"{path} is a convolution with {shape_A[0] // shape_B[1]} groups, and its factors are no product B · A",
            where=str(adapter.path),
        )
    if adapter.config.method_name == "adalora" and len(shape_A) == len(shape_B) == 2 and shape_A[0] == shape_B[1] == 0:
        tensors |= _one_of_zeros(shape_A[1], shape_B[0])
        shape_A, shape_B = (1, shape_A[1]), (shape_B[0], 1)
    if len(shape_A) < 2 or len(shape_B) < 2 or shape_A[0] != shape_B[1] or 0 in (*shape_A, *shape_B):
        raise InputError(
            f"{path} has factors {shape_A} and {shape_B}, which do not go together", where=str(adapter.path)
        )
    flat = {name: tensor.float().flatten(1) for name, tensor in tensors.items()}
    term = METHODS[adapter.config.method_name].from_file(adapter.config, path, flat, torch.empty(0))
    return Factors(path, term.A, term.B, term.scale, shape_A, shape_B, embedding, tensors["lora_A"].dtype)


def _one_of_zeros(into: int, out: int) -> dict[str, torch.Tensor]:
    """A module whose every rank AdaLoRA has pruned: ΔW = 0, in a form that every reader takes."""
    return {"lora_A": torch.zeros(1, into), "lora_B": torch.zeros(out, 1), "lora_E": torch.zeros(1, 1)}
