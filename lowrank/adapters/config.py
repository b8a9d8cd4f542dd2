"""What an adapter is, in peft's words: the fields of `adapter_config.json`, checked when they are written down."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _listed(value: object) -> object:
    """peft keeps sets and, for one name or index, a bare value; here they are lists."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value


Names = Annotated[list[str], BeforeValidator(_listed)]
InitName = Literal["gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]
PissaIterations = Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]*$")]


class EvaConfig(BaseModel):
    """How EVA (Paischer 2024) reads the data that it initialises from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rho: float = Field(default=2.0, ge=1.0)
    """A module may get up to rho times the rank asked for; 1.0 keeps every rank as it is."""


class LoftQConfig(BaseModel):
    """How LoftQ (Li 2023) splits the quantisation error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    loftq_iter: Literal[1] = 1
    """Alternating steps: the base is quantised already, so there is one."""

    loftq_bits: Literal[4] = 4
    """Bits of the base."""


class _Adapter(BaseModel):
    """The fields that every method of the family has."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    target_modules: Names | str | None = "all-linear"
    """Which modules get an adapter: a list of names (a name matches at the end of a module's path), a regular
    expression that must match the whole path, or "all-linear": every linear layer but the head and routers."""

    exclude_modules: Names | str | None = None
    """Modules left out, in the same two forms."""

    lora_alpha: float = Field(default=8, gt=0)
    """The numerator of the scale s = lora_alpha / r."""

    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of the low-rank path, in training."""

    fan_in_fan_out: bool = False
    """Accepted for peft's sake: the layout of a weight is read from its module, so a wrong value is refused."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train: none, every one of the model, or those of the adapted modules."""

    modules_to_save: Names | None = None
    """Modules trained and saved whole, as a copy of their own (a new head, for example)."""

    layers_to_transform: list[int] | int | None = None
    """Only these layers, by number."""

    layers_pattern: Names | str | None = None
    """The name that stands before the layer's number ("layers", "h"), where it is not the first such name."""

    task_type: str | None = None
    """peft's note of the task ("CAUSAL_LM"); kept in the file, no effect here."""

    @model_validator(mode="after")
    def _layers(self) -> Self:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layer numbers stand, and layers_to_transform gives none")
        return self


class LoraConfig(_Adapter):
    """LoRA (Hu 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu 2024)."""

    r: int = Field(default=8, ge=1)
    """The rank: ΔW = s · B · A with A (r, in) and B (out, r)."""

    use_rslora: bool = False
    """s = lora_alpha / √r instead of lora_alpha / r."""

    use_dora: bool = False
    """Train magnitude and direction apart (DoRA)."""

    lora_bias: bool = False
    """Train a bias behind B as well, for each adapted module; it begins at zero and shares the scale s."""

    init_lora_weights: bool | InitName | PissaIterations = True
    """How A and B start. true: A uniform (Kaiming), B zero; "gaussian": A normal, B zero; false: both random (for
    tests: the model's outputs change); "orthogonal"; "pissa", "pissa_niter_N" and "olora": from the base weight's
    leading directions; "loftq": from the quantisation error of a 4-bit base; "eva": from the data's directions."""

    rank_pattern: dict[str, int] = {}
    """A rank of its own for the modules that a name or regular expression matches at the end of their path."""

    alpha_pattern: dict[str, float] = {}
    """Likewise for lora_alpha."""

    target_parameters: Names | None = None
    """Parameters that get factors, by the ends of their names: stacks of experts (experts, ., .), one A and B for each
    ("mlp.experts.gate_up_proj"), and any matrix, a linear layer's too ("q_proj.weight")."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the input embedding that train, and what is tied to it with them; a dict names embeddings and heads, each
    with its tokens."""

    ensure_weight_tying: bool = False
    """Adapt, or save whole, all that is tied to the input embedding together with it, so that it stays tied."""

    eva_config: EvaConfig | None = None
    """For init_lora_weights: eva."""

    loftq_config: LoftQConfig | None = None
    """For init_lora_weights: loftq."""

    @model_validator(mode="after")
    def _inits(self) -> Self:
        if self.eva_config is not None and self.init_lora_weights != "eva":
            raise ValueError("eva_config is set, and init_lora_weights is not eva")
        if self.loftq_config is not None and self.init_lora_weights != "loftq":
            raise ValueError("loftq_config is set, and init_lora_weights is not loftq")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias does not go with use_dora")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"lora_bias does not go with init_lora_weights: {self.init_lora_weights}")
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"rank_pattern gives {pattern!r} the rank {rank}; a rank is at least 1")
        return self

    @property
    def method_name(self) -> str:
        """The name of the method in the registry: "lora" or "dora"."""
        return "dora" if self.use_dora else "lora"

    def scale(self, r: int, alpha: float) -> float:
        """s of ΔW = s · B · A."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


class AdaLoraConfig(_Adapter):
    """AdaLoRA (Zhang 2023): ΔW = s · P · Λ · Q with ranks that shrink to a budget while training."""

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


AdapterConfig = LoraConfig | AdaLoraConfig
