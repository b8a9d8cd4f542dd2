"""AdaLoRA (Zhang 2023): ΔW = s · P · Λ · Q. B holds P (out, r), E the diagonal of Λ (r, 1), A holds Q (r, in)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.methods.lora import Lora, LoraConfig, Scaled, lora_fields, whole
from lowrank.adapters.methods.method import Holder, Holders, Matrix, Method, Named, Outset, Tensors
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-5  # peft divides by r + 1e-5, and files are shared with it


class AdaLoraConfig(AdapterConfig, Scaled):
    """AdaLoRA (Zhang 2023): ΔW = s · P · Λ · Q with ranks that shrink to a budget while training."""

    by_tensor: ClassVar[Mapping[str, str]] = {"rank_pattern": "lora_E"}

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train: none, every one of the model, or those of the adapted modules."""

    init_r: int = Field(default=12, ge=1)
    """Every module's rank at the start."""

    target_r: int = Field(default=8, ge=1)
    """The mean rank at the end."""

    tinit: int = Field(default=0, ge=0)
    """Steps at the full budget, before ranks begin to shrink."""

    tfinal: int = Field(default=0, ge=0)
    """Steps at the final budget, ranks fixed."""

    deltaT: int = Field(default=1, ge=1)
    """Steps between two allocations of the budget."""

    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Smoothing of the sensitivity (equation 9)."""

    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Smoothing of its uncertainty (equation 10)."""

    orth_reg_weight: float = Field(default=0.5, ge=0.0)
    """Weight of the term that keeps P and Q orthogonal (equation 4)."""

    total_step: int | None = Field(default=None, ge=1)
    """Optimiser steps of the whole run; a run from a config fills it in."""

    init_lora_weights: bool = True
    """true: P and Q normal (0.02), Λ zero; false: all random (for tests)."""

    rank_pattern: dict[str, list[bool]] | None = None
    """Which ranks of every module were kept; written when the adapter is saved."""

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if self.target_r > self.init_r:
            raise ValueError(f"target_r ({self.target_r}) is above init_r ({self.init_r}): ranks only shrink")
        if self.total_step is not None and self.tinit + self.tfinal >= self.total_step:
            raise ValueError(
                f"tinit + tfinal ({self.tinit} + {self.tfinal}) leave no step of {self.total_step} to shrink ranks in"
            )
        return self

    @property
    def r(self) -> int:
        """The rank at the start."""
        return self.init_r

    @property
    def method_name(self) -> str:
        """The name of the method in the registry."""
        return "adalora"


class AdaLora(Method):
    """AdaLoRA. A layer has besides its factors `kept` (r,), False where the budget has pruned a triplet."""

    name = "adalora"
    summary = "AdaLoRA: low-rank factors whose ranks shrink to a budget where they matter least."
    config = AdaLoraConfig
    peft_type = "ADALORA"
    # peft's AdaLoRA keeps two dimensions and adds no `.weight`.
    factors = (Factor("lora_A", "lora_A"), Factor("lora_E", "lora_E"), Factor("lora_B", "lora_B"))
    neutral = Lora.neutral
    unused = frozenset({"r", "init_lora_weights"})  # peft's config inherits them from LoRA's
    start_only = Lora.start_only
    set_by_run = ("total_step",)
    spans_run = "AdaLoRA shrinks its ranks over the whole of them"

    def rank(self, config: AdaLoraConfig, path: str) -> int:
        """A rank pattern in the config gives the ranks that an earlier run has kept."""
        kept = (config.rank_pattern or {}).get(f"{path}.lora_E")
        return config.init_r if kept is None else sum(kept)

    def scale(self, config: AdaLoraConfig, path: str) -> float:
        """lora_alpha over the rank at the start."""
        return config.lora_alpha / (config.init_r + _EPSILON)

    def dropout(self, config: AdaLoraConfig) -> float:
        """`lora_dropout`."""
        return config.lora_dropout

    def shapes(self, config: AdaLoraConfig, matrix: Matrix, r: int) -> dict[str, tuple[int, ...]]:
        """A (r, in), E (r, 1), B (out, r)."""
        if matrix.looked_up:
            raise InputError(f"AdaLoRA fits linear layers and convolutions, and {matrix.path} is an embedding")
        if matrix.groups > 1:
            raise InputError(f"AdaLoRA does not fit {matrix.path}, a convolution with {matrix.groups} groups")
        return {"lora_A": (r, matrix.into), "lora_E": (r, 1), "lora_B": (matrix.out, r)}

    def start(self, layer: Holder, config: AdaLoraConfig, module: Any, matrix: Matrix, outset: Outset) -> None:
        """P and Q normal, all ranks kept."""
        import torch

        spread = 0.02 if config.init_lora_weights else 1.0
        layer.lora_A.normal_(std=spread)
        layer.lora_B.normal_(std=spread)
        layer.lora_E.zero_() if config.init_lora_weights else layer.lora_E.normal_()
        layer.register_buffer("kept", torch.ones(len(layer.lora_E), dtype=torch.bool, device=layer.lora_E.device))

    def low_rank(self, tensors: Tensors, scale: float, matrix: Matrix | None) -> LowRank:
        """Λ is folded into A, (r, in): small beside a product with the inputs."""
        return LowRank(tensors["lora_A"] * tensors["lora_E"], tensors["lora_B"], scale)

    def product(self, config: AdaLoraConfig, matrix: Matrix, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        """s · P · (Λ · (Q · x))."""
        A, E, B = (tensors[name].to(x.dtype) for name in ("lora_A", "lora_E", "lora_B"))
        return config.lora_alpha / (config.init_r + 1e-5) * (B @ (E[:, 0] * (A @ x)))

    def fields_of(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """As LoRA's."""
        return lora_fields(raw, where)

    def to_json(self, config: AdaLoraConfig) -> dict[str, Any]:
        """peft writes alphas as integers."""
        return {**super().to_json(config), "lora_alpha": whole(config.lora_alpha)}

    def scaled(self, config: AdaLoraConfig, tensors: Named, factor: float) -> tuple[AdaLoraConfig, Named]:
        """Its alpha."""
        return config.model_copy(update={"lora_alpha": config.lora_alpha * factor}), tensors

    def portable(self, config: AdaLoraConfig, tensors: Named, layers: Holders) -> tuple[AdaLoraConfig, Named]:
        """Pruned ranks are cut off, and `rank_pattern` says which were kept."""
        if config.total_step is None:  # peft refuses that; any number that leaves room for a budget says as little
            config = config.model_copy(update={"total_step": config.tinit + config.tfinal + 1})
        kept: dict[str, list[bool]] = {}
        for path, (_, layer) in layers.items():
            kept[f"{path}.lora_E"] = layer.kept.tolist()
            for name in ("lora_A", "lora_E"):
                tensors[f"{path}.{name}"] = tensors[f"{path}.{name}"][layer.kept]
            tensors[f"{path}.lora_B"] = tensors[f"{path}.lora_B"][:, layer.kept]
        if config.rank_pattern is None and all(all(ranks) for ranks in kept.values()):
            return config, tensors
        return config.model_copy(update={"rank_pattern": _in_full(config, kept)}), tensors

    def as_lora(self, config: AdaLoraConfig, tensors: Named, layers: Holders) -> tuple[LoraConfig, Named]:
        """An ordinary LoRA with a rank pattern: A ← Λ·Q and B ← P.

        A module that kept no rank gets one of zeros: in a LoRA a rank is at least 1.
        """
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for path, (_, layer) in layers.items():
            A, E, B = (tensors.pop(f"{path}.{name}") for name in ("lora_A", "lora_E", "lora_B"))
            if A.shape[0] == 0:
                A, E, B = A.new_zeros(1, A.shape[1]), A.new_ones(1, 1), B.new_zeros(B.shape[0], 1)
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = A * E, B
            ranks[path], alphas[path] = A.shape[0], layer.scale * A.shape[0]
        shared = set(LoraConfig.model_fields) & set(AdaLoraConfig.model_fields) - {"rank_pattern", "init_lora_weights"}
        fields: dict[str, Any] = {name: getattr(config, name) for name in shared}
        fields |= {"r": max(ranks.values()), "rank_pattern": ranks, "alpha_pattern": alphas}
        return LoraConfig.model_validate(fields), tensors

    def headline(self, config: AdaLoraConfig) -> str:
        """Its alpha."""
        return f"lora_alpha {config.lora_alpha:g}, {super().headline(config)}"

    def companion(self, config: AdaLoraConfig, layers: Holders, total_step: int) -> Any:
        """The budget of ranks."""
        from lowrank.adapters.methods.adalora_budget import Budget

        return Budget([layer for _, layer in layers.values()], config, total_step)


def _in_full(config: AdaLoraConfig, kept: dict[str, list[bool]]) -> dict[str, list[bool]]:
    """What is kept now, told of the ranks that the adapter began with: an earlier run may have cut some off."""
    pattern = {}
    for name, now in kept.items():
        ranks = iter(now)
        before = (config.rank_pattern or {}).get(name, [True] * len(now))
        pattern[name] = [was_kept and next(ranks) for was_kept in before]
    return pattern
