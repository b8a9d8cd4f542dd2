"""VeRA (Kopiczko 2023): ΔW = diag(b) · B · diag(d) · A, where all modules share A and B, random and frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.methods.lora import LORA_A, LORA_B, LoraConfig, plain_lora
from lowrank.adapters.methods.method import Holder, Holders, Matrix, Method, Named, Outset, Tensors
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank

if TYPE_CHECKING:
    import torch


class VeraConfig(AdapterConfig):
    """VeRA (Kopiczko 2023): two vectors for each module train, on two random matrices that all modules share."""

    bias: Literal["none", "all", "vera_only"] = "none"
    """Which biases train: none, every one of the model, or those of the adapted modules."""

    r: int = Field(default=256, ge=1)
    """The rank of the shared matrices. A rank costs one number a module: take more than for LoRA."""

    vera_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of the low-rank path, in training."""

    d_initial: float = 0.1
    """What d begins with, 0.1 or less; b begins with zero."""

    projection_prng_key: int = 0
    """The seed of the shared matrices."""

    save_projection: bool = True
    """Whether files hold the shared matrices; false: they are made anew from their seed, which is only sure to give the
    same numbers with the same release of torch."""

    init_weights: bool = True
    """true: as said above; false: b of ones and d random (for tests: the model's outputs change)."""

    @property
    def method_name(self) -> str:
        """The name of the method in the registry."""
        return "vera"


class Vera(Method):
    """VeRA. The shared matrices are as wide and as high as the largest module; another one takes its part of them."""

    name = "vera"
    summary = "VeRA: two vectors for each weight on random matrices that all share; far fewer numbers than LoRA."
    config = VeraConfig
    peft_type = "VERA"
    factors = (Factor("vera_lambda_d", "vera_lambda_d"), Factor("vera_lambda_b", "vera_lambda_b"))
    shared = ("vera_A", "vera_B")
    lacks = frozenset({"exclude_modules"})
    of_base = True

    def rank(self, config: VeraConfig, path: str) -> int:
        """The same everywhere."""
        return config.r

    def scale(self, config: VeraConfig, path: str) -> float:
        """None of its own."""
        return 1.0

    def dropout(self, config: VeraConfig) -> float:
        """`vera_dropout`."""
        return config.vera_dropout

    def shapes(self, config: VeraConfig, matrix: Matrix, r: int) -> dict[str, tuple[int, ...]]:
        """d (r,), b (out,)."""
        if not matrix.linear:
            raise InputError(f"VeRA fits linear layers, and {matrix.path} is none")
        return {"vera_lambda_d": (r,), "vera_lambda_b": (matrix.out,)}

    def shared_for(self, config: VeraConfig, matrices: Iterable[Matrix]) -> Named:
        """A (r, widest), B (highest, r), uniform (He 2015): peft's numbers for the same seed."""
        import torch

        sizes = [(matrix.out, matrix.into) for matrix in matrices]
        if not sizes:
            return {}
        highest, widest = max(out for out, _ in sizes), max(into for _, into in sizes)
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        made: Named = {}
        for name, shape in (("vera_A", (config.r, widest)), ("vera_B", (highest, config.r))):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            made[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return made

    def start(self, layer: Holder, config: VeraConfig, module: Any, matrix: Matrix, outset: Outset) -> None:
        """ΔW starts at zero."""
        if config.init_weights:
            layer.vera_lambda_d.fill_(config.d_initial)
            layer.vera_lambda_b.zero_()
        else:
            layer.vera_lambda_d.normal_()
            layer.vera_lambda_b.fill_(1.0)

    def low_rank(self, tensors: Tensors, scale: float, matrix: Matrix | None) -> LowRank:
        """Both vectors are folded into B, so that the frozen A needs no gradient."""
        assert matrix is not None, "of_base"
        b, d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
        A, B = tensors["vera_A"].to(b.device)[:, : matrix.into], tensors["vera_B"].to(b.device)[: len(b)]
        return LowRank(A, b[:, None] * B * d, scale)

    def product(self, config: VeraConfig, matrix: Matrix, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        """b · (B · (d · (A · x)))."""
        b, d, A, B = (tensors[name].to(x.dtype) for name in ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"))
        return b * (B[: len(b)] @ (d * (A[:, : len(x)] @ x)))

    def saves_shared(self, config: VeraConfig) -> bool:
        """`save_projection`."""
        return config.save_projection

    def scaled(self, config: VeraConfig, tensors: Named, factor: float) -> tuple[VeraConfig, Named]:
        """Every b."""
        ends = ".vera_lambda_b"
        return config, {name: each * factor if name.endswith(ends) else each for name, each in tensors.items()}

    def as_lora(self, config: VeraConfig, tensors: Named, layers: Holders) -> tuple[LoraConfig, Named]:
        """An ordinary LoRA of the same rank, which is much larger."""
        rest = {name: each for name, each in tensors.items() if "vera_" not in name}
        for path, (module, layer) in layers.items():
            term = layer.term(module)
            rest[f"{path}.{LORA_A.in_file}"] = (term.A * term.scale).detach()
            rest[f"{path}.{LORA_B.in_file}"] = term.B.detach()
        return plain_lora(config, config.r, config.vera_dropout, config.bias.replace("vera", "lora")), rest

    def headline(self, config: VeraConfig) -> str:
        """Its seed."""
        return f"projection_prng_key {config.projection_prng_key}, {super().headline(config)}"
