"""MiSS (Kang 2024): ΔW = Dᵀ · S. D (r, out) trains; S (r, in) is fixed, and sums every r-th input.

S[i, j] is 1 where j mod r = i, else 0. Where r does not divide the inputs it is cut off, as if zeros followed them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.methods.lora import LORA_A, LORA_B, LoraConfig, plain_lora
from lowrank.adapters.methods.method import Holder, Holders, Matrix, Method, Named, Outset, Tensors
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank

if TYPE_CHECKING:
    import torch


class MissConfig(AdapterConfig):
    """MiSS (Kang 2024)."""

    bias: Literal["none", "all", "MiSS_only"] = "none"
    """Which biases train: none, every one of the model, or those of the adapted modules."""

    r: int = Field(default=64, ge=1)
    """The rank: how many sums of its inputs each adapted module sees."""

    miss_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the inputs that are summed, in training."""

    init_weights: bool | Literal["mini", "bat"] = True
    """true: D (r, out) of zeros; false: random (for tests: the model's outputs change); "mini": D (r, mini_r) of zeros,
    the same for each stretch of mini_r outputs."""

    mini_r: int = Field(default=1, ge=1)
    """For init_weights: mini; it divides every adapted module's outputs."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.init_weights == "bat":
            raise ValueError(
                "init_weights: bat adds products with blocks of the weight itself, which is no low-rank term; "
                "true and mini can be had"
            )
        if self.mini_r != 1 and self.init_weights != "mini":
            raise ValueError("mini_r is set, and init_weights is not mini")
        return self

    @property
    def method_name(self) -> str:
        """The name of the method in the registry."""
        return "miss"


class Miss(Method):
    """MiSS. All layers share one S, as wide as the widest of them."""

    name = "miss"
    summary = "MiSS: one factor beside frozen weights, on sums of their inputs."
    config = MissConfig
    peft_type = "MISS"
    factors = (Factor("miss_block", "miss_block"),)
    shared = ("miss_sums",)
    lacks = frozenset({"fan_in_fan_out"})
    of_base = True

    def rank(self, config: MissConfig, path: str) -> int:
        """The same everywhere."""
        return config.r

    def scale(self, config: MissConfig, path: str) -> float:
        """None but 1."""
        return 1.0

    def dropout(self, config: MissConfig) -> float:
        """`miss_dropout`."""
        return config.miss_dropout

    def shapes(self, config: MissConfig, matrix: Matrix, r: int) -> dict[str, tuple[int, ...]]:
        """D (r, out); with "mini" (r, mini_r)."""
        if not matrix.linear:
            raise InputError(f"MiSS fits linear layers, and {matrix.path} is none")
        if r > matrix.into:
            raise InputError(
                f"r is {r}, and {matrix.path} has {matrix.into} inputs to sum",
                fix=f"Take an r of at most {matrix.into}, or do not adapt it.",
            )
        if config.init_weights != "mini":
            return {"miss_block": (r, matrix.out)}
        if matrix.out % config.mini_r:
            raise InputError(
                f"mini_r is {config.mini_r}, which does not divide the {matrix.out} outputs of {matrix.path}"
            )
        return {"miss_block": (r, config.mini_r)}

    def shared_for(self, config: MissConfig, matrices: Iterable[Matrix]) -> Named:
        """S for the widest module; a narrower one's is its beginning."""
        import torch

        into = max((matrix.into for matrix in matrices), default=0)
        return {"miss_sums": torch.eye(config.r).repeat(1, math.ceil(into / config.r))[:, :into].contiguous()}

    def saves_shared(self, config: MissConfig) -> bool:
        """It follows from r."""
        return False

    def start(self, layer: Holder, config: MissConfig, module: Any, matrix: Matrix, outset: Outset) -> None:
        """By `init_weights`."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        if isinstance(module, Conv1D):
            raise InputError(f"MiSS fits linear layers, and {matrix.path} is a Conv1D (which peft refuses, too)")
        if config.init_weights:
            layer.miss_block.zero_()
        else:
            nn.init.kaiming_uniform_(layer.miss_block, a=math.sqrt(5))

    def low_rank(self, tensors: Tensors, scale: float, matrix: Matrix | None) -> LowRank:
        """A is S, B is Dᵀ."""
        assert matrix is not None
        D = tensors["miss_block"]
        B = D.t() if D.shape[1] == matrix.out else D.t().repeat(matrix.out // D.shape[1], 1)
        return LowRank(tensors["miss_sums"][:, : matrix.into].to(D), B, scale)

    def product(self, config: MissConfig, matrix: Matrix, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        """Dᵀ · Σₖ x[k · r : (k + 1) · r], zeros after x's end."""
        import torch

        sums = torch.nn.functional.pad(x, (0, -len(x) % config.r)).view(-1, config.r).sum(0)
        by_stretch = sums @ tensors["miss_block"].to(x.dtype)
        return by_stretch.repeat(matrix.out // len(by_stretch))

    def fields_of(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`mini_r` says something beside "mini" alone."""
        return {name: value for name, value in raw.items() if name != "mini_r" or raw.get("init_weights") == "mini"}

    def scaled(self, config: MissConfig, tensors: Named, factor: float) -> tuple[MissConfig, Named]:
        """D: there is no field for it."""
        return config, {name: factor * each if name.endswith("miss_block") else each for name, each in tensors.items()}

    def as_lora(self, config: MissConfig, tensors: Named, layers: Holders) -> tuple[LoraConfig, Named]:
        """A ← S and B ← Dᵀ, at scale 1."""
        import torch

        for path, (module, layer) in layers.items():
            given = {**layer.tensors(), "miss_block": tensors.pop(f"{path}.miss_block")}
            term = self.low_rank(given, 1.0, layer.matrix)
            for factor, values in ((LORA_A, term.A), (LORA_B, term.B)):
                name, shaped = layer.kind.in_file(module, factor, values.clone(memory_format=torch.contiguous_format))
                tensors[f"{path}.{name}"] = shaped
        return plain_lora(config, config.r, config.miss_dropout, config.bias.replace("MiSS", "lora")), tensors

    def headline(self, config: MissConfig) -> str:
        """Into how many outputs "mini" gathers them."""
        mini = f"mini_r {config.mini_r}, " if config.init_weights == "mini" else ""
        return mini + super().headline(config)
