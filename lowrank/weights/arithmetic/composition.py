"""Several adapters into one, without the base: sums, SVD, TIES, DARE, pruning; and one adapter to a lower rank."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch

from lowrank.adapters.methods.lora import LoraConfig
from lowrank.errors import InputError
from lowrank.storage.folders import refuse_inside
from lowrank.weights.arithmetic.combine import FACTOR_METHODS
from lowrank.weights.arithmetic.compose_methods import ComposeMethod, MajoritySign
from lowrank.weights.arithmetic.composition_rest import Rest, compose_rest, rest_of
from lowrank.weights.arithmetic.factors import (
    Product,
    check_limits,
    distance,
    norm,
    padded,
    rank_fields,
    total,
    truncated,
)
from lowrank.weights.arithmetic.module_factors import Factors, read_factors
from lowrank.weights.files.adapter_file import AdapterFile, open_adapter, shorten
from lowrank.weights.files.target_names import targets_of
from lowrank.weights.files.writing import write_adapter

_ON_PRODUCTS = {f"{method}_svd": method for method in FACTOR_METHODS if method != "linear"}
_PRUNING = {*_ON_PRODUCTS, *_ON_PRODUCTS.values()}


@dataclass(frozen=True, slots=True)
class ComposeReport:
    """What came out.

    Attributes:
        out: The new adapter's folder.
        method: How it was made.
        ranks: Module path -> rank.
        errors: Module path -> ‖ΔW - Σ wᵢ·ΔWᵢ‖ / ‖Σ wᵢ·ΔWᵢ‖, how far it is from the plain weighted sum.
        error: The same over all modules.
        notes: What the user should know.
    """

    out: Path
    method: str
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float
    notes: list[str] = field(default_factory=list)


def compose(
    adapters: Sequence[str | Path],
    *,
    out: str | Path,
    weights: Sequence[float] | None = None,
    method: ComposeMethod = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    seed: int = 0,
) -> ComposeReport:
    """Makes one LoRA of several (LoRA, rsLoRA or AdaLoRA; ranks and targets may differ).

    A weight of -1 takes an adapter's effect away; one adapter with one weight is scaled or negated.

    Args:
        adapters: Adapter folders, trained on the same base.
        out: The new adapter's folder.
        weights: One for each adapter; 1 by default.
        method: "cat": the exact weighted sum, ranks add. "svd": the nearest to it at a lower rank. "linear", "ties",
            "dare_linear", "dare_ties", "magnitude_prune": on the factors, as peft's `add_weighted_adapter`; with "_svd"
            at the end on each module's ΔW, formed, and then the nearest product of a lower rank.
        rank: For "svd" and its kin: of every module; the largest of the adapters' by default.
        energy: For "svd" and its kin: instead of a rank, the share of ‖ΔW‖² that each module keeps.
        density: For pruning methods: the share of values that is kept.
        majority_sign: For TIES: whose sign wins, by "total" value or by "frequency".
        seed: For DARE.

    Returns:
        Ranks, and the distance from the plain weighted sum.

    Raises:
        InputError: An adapter cannot be read or composed (DoRA, experts, two that hold the same module whole), shapes
            or bases differ, an argument does not go with the method.
    """
    chosen = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    _check_arguments(adapters, chosen, method, rank, energy, density, majority_sign)
    files = [open_adapter(adapter) for adapter in adapters]
    for file in files:
        refuse_inside(Path(out), file.path)
    notes = _check_bases(files)
    read = [read_factors(file, rest_of(file)) for file in files]
    limit = rank if rank is not None or energy is not None else max(f.product.rank for r in read for f in r.values())
    way = _Way(method, limit, energy, density or 1.0, majority_sign, seed)
    composed: dict[str, Factors] = {}
    errors: dict[str, tuple[float, float]] = {}
    for path in dict.fromkeys(path for factors in read for path in factors):
        present = [(factors[path], weight) for factors, weight in zip(read, chosen, strict=True) if path in factors]
        _check_shapes(path, [factors for factors, _ in present])
        exact = total([factors.product.times(weight) for factors, weight in present])
        product = way.of(path, present, exact)
        composed[path] = present[0][0].with_factors(product.A, product.B)
        errors[path] = (distance(product, exact), norm(exact))
    rest = compose_rest(files, chosen, {path: factors.B.shape[0] for path, factors in composed.items()})
    _write(Path(out), files, composed, rest)
    return _report(Path(out), method, composed, errors, notes)


def resize(
    adapter: str | Path, rank: int | None = None, *, out: str | Path, energy: float | None = None
) -> ComposeReport:
    """An adapter at a lower rank, the nearest that there is; the report says how near.

    Args:
        adapter: An adapter folder.
        rank: The new rank of every module (a module whose rank is lower keeps it).
        out: The new adapter's folder.
        energy: Instead of a rank: the share of ‖ΔW‖² that each module keeps, with the fewest ranks.

    Raises:
        InputError: The adapter cannot be read or composed, or neither a rank nor an energy is given.
    """
    if rank is None and energy is None:
        raise InputError("neither a rank nor an energy is given", fix="Give rank (--rank) or energy (--energy).")
    return compose([adapter], out=out, method="svd", rank=rank, energy=energy)


@dataclass(frozen=True, slots=True)
class _Way:
    """How the terms of one module become one."""

    method: ComposeMethod
    rank: int | None
    energy: float | None
    density: float
    sign: MajoritySign
    seed: int

    def of(self, path: str, present: list[tuple[Factors, float]], exact: Product) -> Product:
        """The product for the module at `path` from its factors with their weights; `exact` is their weighted sum."""
        if self.method == "cat":
            return exact
        if self.method == "svd":
            return truncated(exact, self.rank, self.energy)
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(path.encode()))
        combine = _on_factors if self.method in FACTOR_METHODS else _on_products
        product = combine(self.method.removesuffix("_svd"), present, self.density, self.sign, generator)
        return product if self.method in FACTOR_METHODS else truncated(product, self.rank, self.energy)


def _report(
    out: Path, method: str, composed: dict[str, Factors], errors: dict[str, tuple[float, float]], notes: list[str]
) -> ComposeReport:
    error = math.sqrt(sum(error**2 for error, _ in errors.values()))
    size = math.sqrt(sum(size**2 for _, size in errors.values()))
    return ComposeReport(
        out=out,
        method=method,
        ranks={path: factors.product.rank for path, factors in composed.items()},
        errors={path: error / size if size else 0.0 for path, (error, size) in errors.items()},
        error=error / size if size else 0.0,
        notes=notes,
    )


def _on_factors(
    method: str,
    present: list[tuple[Factors, float]],
    density: float,
    sign: MajoritySign,
    generator: torch.Generator,
) -> Product:
    """A's with A's and B's with B's, each with the root of its weight and scale; missing ranks are zeros."""
    signed = torch.tensor([weight * factors.scale for factors, weight in present])
    roots = signed.abs().sqrt()
    rank = max(factors.A.shape[0] for factors, _ in present)
    equal = [padded(Product(factors.A, factors.B), rank) for factors, _ in present]
    stacked_A, stacked_B = torch.stack([each.A for each in equal]), torch.stack([each.B for each in equal])
    combine = FACTOR_METHODS[method]
    A = combine(stacked_A, torch.where(signed < 0, -roots, roots), density, sign, generator)
    return Product(A, combine(stacked_B, roots, density, sign, generator))


def _on_products(
    method: str,
    present: list[tuple[Factors, float]],
    density: float,
    sign: MajoritySign,
    generator: torch.Generator,
) -> Product:
    """On each ΔW (out, in), formed; the result as the product of itself and the identity."""
    formed = torch.stack([factors.product.B @ factors.product.A for factors, _ in present])
    weights = torch.tensor([weight for _, weight in present])
    combined = FACTOR_METHODS[method](formed, weights, density, sign, generator)
    out, into = combined.shape
    return Product(combined, torch.eye(out)) if out <= into else Product(torch.eye(into), combined)


def _write(out: Path, files: list[AdapterFile], composed: dict[str, Factors], rest: Rest) -> None:
    first = files[0]
    config = LoraConfig(
        **rank_fields({path: factors.product.rank for path, factors in composed.items()}),
        target_modules=targets_of([file.config for file in files], list(composed)),
        fan_in_fan_out=first.config.fan_in_fan_out,
        task_type=first.config.task_type,
        **rest.fields,
    )
    tensors = {name: tensor for factors in composed.values() for name, tensor in factors.in_file().items()}
    tensors |= rest.tensors
    write_adapter(
        out,
        config,
        tensors,
        base=first.base,
        revision=first.revision,
        fingerprint=next((file.fingerprint for file in files if file.fingerprint), None),
        quantization=next((file.quantization for file in files if file.quantization is not None), None),
        notes=_notes_of(files),
    )


def _notes_of(files: list[AdapterFile]) -> Path | None:
    """The first adapter's folder that has a tokenizer."""
    return next((file.path for file in files if (file.path / "tokenizer_config.json").is_file()), None)


def _check_arguments(
    adapters: Sequence[str | Path],
    weights: list[float],
    method: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
    majority_sign: str,
) -> None:
    known = get_args(ComposeMethod)
    if method not in known:
        raise InputError(f"there is no method {method!r}; there are {', '.join(known)}")
    if not adapters:
        raise InputError("no adapter is given")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"{len(weights)} weights are given for {len(adapters)} adapters; one finite number each")
    if (rank is not None or energy is not None) and not method.endswith("svd"):
        raise InputError(f"a rank or an energy is chosen by the method svd and its kin, not by {method}")
    check_limits(rank, energy)
    if (density is None) == (method in _PRUNING):
        raise InputError(f"{method} {'needs a' if method in _PRUNING else 'has no'} density")
    if density is not None and not 0 < density <= 1:
        raise InputError(f"the density is {density}; it is above 0 and at most 1")
    if majority_sign not in get_args(MajoritySign):
        raise InputError(f"there is no majority sign {majority_sign!r}; there are {', '.join(get_args(MajoritySign))}")


def _check_bases(files: list[AdapterFile]) -> list[str]:
    prints = [(file.path, file.fingerprint) for file in files if file.fingerprint is not None]
    for path, fingerprint in prints[1:]:
        if different := fingerprint.differences(prints[0][1]):
            raise InputError(
                f"the adapters were trained on different bases: {path} has {', '.join(different)} in {prints[0][0]}"
            )
    revisions = {(file.base, file.revision) for file in files if file.revision is not None}
    if len(revisions) > len({base for base, _ in revisions}):
        named = ", ".join(sorted(str(revision) for _, revision in revisions))
        raise InputError(f"the adapters were trained on different revisions of their base: {named}")
    names = sorted({str(file.base) for file in files})
    notes = [f"The adapters name different bases: {shorten(names)}."] if len(names) > 1 else []
    known = [file.quantization for file in files if file.quantization is not None]
    if any(quantization != known[0] for quantization in known):
        notes.append(
            "The adapters were trained over differently quantised bases; the new one's file says what the first's says."
        )
    return notes


def _check_shapes(path: str, factors: list[Factors]) -> None:
    shapes = {(f.B.shape[0], *f.shape_A[1:]) for f in factors}
    if len(shapes) > 1:
        raise InputError(f"the adapters do not fit one another: {path} has the sizes {sorted(shapes)}")
