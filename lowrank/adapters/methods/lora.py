"""LoRA (Hu 2021): ΔW = s · B · A, s = lora_alpha / r; rsLoRA (Kalajdzievski 2023): s = lora_alpha / √r."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lowrank.adapters.config import AdapterConfig, Names, Targets
from lowrank.adapters.kinds.factor import Factor
from lowrank.adapters.methods.method import Batches, Holder, Holders, Matrix, Method, Named, Originals, Outset, Tensors
from lowrank.adapters.targeting.matching import pattern_value
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank

if TYPE_CHECKING:
    import torch

InitName = Literal["gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"]
PissaIterations = Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]*$")]

LORA_A = Factor("lora_A", "lora_A.weight", "in", "lora_embedding_A")
LORA_B = Factor("lora_B", "lora_B.weight", "out", "lora_embedding_B")
LORA_BIAS = "lora_B.bias"
"""What `lora_bias` trains, after the module's path in a file."""

# Initialisations after which A and B belong to a base that was changed; peft changes it again on loading. What the
# first two took out of the base can be worked out from it again.
_TAKES_OUT, _CHANGES_BASE = ("pissa", "olora"), ("pissa_niter", "corda", "loftq", "lora_ga")


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


class Scaled(Targets):
    """The fields of LoRA and its kin that say how strongly it acts."""

    lora_alpha: float = Field(default=8, gt=0)
    """The numerator of the scale s = lora_alpha / r."""

    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of the low-rank path, in training."""


class LoraConfig(AdapterConfig, Scaled):
    """LoRA (Hu 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu 2024)."""

    by_module: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train: none, every one of the model, or those of the adapted modules."""

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

    rank_pattern: dict[str, int] = Field(default={})
    """A rank of its own for the modules that a name or regular expression matches at the end of their path."""

    alpha_pattern: dict[str, float] = Field(default={})
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
        if self.use_dora and self.method_name != "dora":
            raise ValueError(f"use_dora is another method than {self.method_name}")
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

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """r and s of the module at `path`, by the config's patterns."""
        r = pattern_value(self.rank_pattern, path, self.r)
        return r, self.scale(r, pattern_value(self.alpha_pattern, path, self.lora_alpha))


class Lora(Method):
    """LoRA.

    A layer has besides A (r, in) and B (out, r): `lora_bias` (out,), which `lora_bias` trains behind B, or None; and
    `start_A`, `start_B`, for initialisations that begin at the base's own directions (PiSSA, OLoRA): the factors at the
    start. What they stand for is subtracted: the adapted model starts as the base, which stays untouched.
    """

    name = "lora"
    summary = "LoRA: low-rank factors beside frozen weights; the default."
    config: ClassVar[type[AdapterConfig]] = LoraConfig
    peft_type = "LORA"
    factors = (LORA_A, LORA_B)
    neutral: ClassVar[Mapping[str, Any]] = {"megatron_core": "megatron.core", "qalora_group_size": 16}
    start_only = frozenset({"corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config"})
    in_transformers = True

    def rank(self, config: LoraConfig, path: str) -> int:
        """By `rank_pattern`."""
        return config.rank_and_scale(path)[0]

    def scale(self, config: LoraConfig, path: str) -> float:
        """By `alpha_pattern`, and the rank."""
        return config.rank_and_scale(path)[1]

    def dropout(self, config: LoraConfig) -> float:
        """`lora_dropout`."""
        return config.lora_dropout

    def shapes(self, config: LoraConfig, matrix: Matrix, r: int) -> dict[str, tuple[int, ...]]:
        """A (r, in), B (out, r); of a convolution with groups B (out, r / groups)."""
        if r % matrix.groups:
            raise InputError(
                f"r is {r}, and a convolution with {matrix.groups} groups takes a multiple of {matrix.groups}",
                fix="Give it a rank of its own in rank_pattern, or do not adapt it.",
            )
        return {"lora_A": (r, matrix.into), "lora_B": (matrix.out, r // matrix.groups)}

    def low_rank(self, tensors: Tensors, scale: float, matrix: Matrix | None) -> LowRank:
        """A and B themselves."""
        return LowRank(tensors["lora_A"], tensors["lora_B"], scale)

    def product(self, config: LoraConfig, matrix: Matrix, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
        """s · B · (A · x), the rank that of A."""
        A, B = tensors["lora_A"].to(x.dtype), tensors["lora_B"].to(x.dtype)
        alpha = pattern_value(config.alpha_pattern, matrix.path, config.lora_alpha)
        return alpha / (math.sqrt(len(A)) if config.use_rslora else len(A)) * (B @ (A @ x))

    def prepare(
        self,
        model: Any,
        config: LoraConfig,
        targets: Mapping[str, Any],
        batches: Batches | None,
        originals: Originals | None,
    ) -> Outset:
        """EVA looks at the inputs and shares the ranks out by them, LoftQ wants the weights before."""
        from lowrank.adapters.initialisations.eva import allocate, input_directions
        from lowrank.adapters.initialisations.site import Outside

        _check_given(config, "eva", "batches", batches)
        _check_given(config, "loftq", "originals", originals)
        if batches is None:
            return Outset(config, outside=Outside(originals=originals))
        rho = (config.eva_config or EvaConfig()).rho
        asked = {path: self.rank(config, path) for path in targets}
        found = input_directions(model, targets, batches, k=int(rho * max(asked.values())))
        vectors = {path: directions.vectors for path, directions in found.items()}
        return Outset(_with_ranks(config, allocate(found, asked, rho)), outside=Outside(vectors))

    def start(self, layer: Holder, config: LoraConfig, module: Any, matrix: Matrix, outset: Outset) -> None:
        """By `init_lora_weights`."""
        import torch

        from lowrank.adapters.initialisations.initialise import initialise
        from lowrank.adapters.initialisations.site import Outside, Site

        outside = outset.outside or Outside()
        site = Site(matrix.path, module, layer.kind, layer.lora_A, layer.lora_B, layer.trained_scale, outside)
        layer.lora_bias = None
        if config.lora_bias:
            if matrix.looked_up:
                raise InputError(f"lora_bias does not fit {matrix.path}: an embedding has no bias")
            layer.lora_bias = torch.nn.Parameter(layer.lora_B.new_zeros(matrix.out))
        made = initialise(config.init_lora_weights, site)
        layer.lora_A.copy_(made.A)
        layer.lora_B.copy_(made.B)
        layer.register_buffer("start_A", layer.lora_A.detach().clone() if made.subtracted else None)
        layer.register_buffer("start_B", layer.lora_B.detach().clone() if made.subtracted else None)

    def term(self, layer: Holder, module: Any) -> LowRank:
        """s · B · A, less what the factors began with."""
        A, B = layer.lora_A, layer.lora_B
        if layer.start_A is not None:
            import torch

            A, B = torch.cat([A, layer.start_A]), torch.cat([B, -layer.start_B], dim=1)
        return LowRank(A, B, layer.scale)

    def own_bias(self, layer: Holder) -> torch.Tensor | None:
        """The bias behind B carries the scale, as B does."""
        return None if layer.lora_bias is None else layer.scale * layer.lora_bias

    def more_in_file(self, layer: Holder) -> dict[str, torch.Tensor]:
        """What `lora_bias` trained."""
        return {} if layer.lora_bias is None else {LORA_BIAS: layer.lora_bias}

    def check_mergeable(self, path: str, layer: Holder, module: Any) -> None:
        """A module that was built without a bias does not get one."""
        if layer.lora_bias is not None and module.bias is None:
            raise InputError(
                f"{path} cannot be merged: lora_bias trained a bias, and it has none",
                fix="Use the adapter without merging it.",
            )

    def fields_of(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """How a finished adapter began says nothing, unless the base was changed for it."""
        return lora_fields(raw, where)

    def to_json(self, config: LoraConfig) -> dict[str, Any]:
        """peft writes alphas as integers."""
        fields = super().to_json(config)
        fields["alpha_pattern"] = {name: whole(alpha) for name, alpha in fields["alpha_pattern"].items()}
        return {**fields, "lora_alpha": whole(config.lora_alpha)}

    def taken_out(self, config: LoraConfig) -> str | None:
        """PiSSA's and OLoRA's own, of a file that peft wrote."""
        init = config.init_lora_weights
        return init if isinstance(init, str) and init in _TAKES_OUT else None

    def scaled(self, config: LoraConfig, tensors: Named, factor: float) -> tuple[LoraConfig, Named]:
        """Every alpha."""
        pattern = {name: alpha * factor for name, alpha in config.alpha_pattern.items()}
        return config.model_copy(update={"lora_alpha": config.lora_alpha * factor, "alpha_pattern": pattern}), tensors

    def portable(self, config: LoraConfig, tensors: Named, layers: Holders) -> tuple[LoraConfig, Named]:
        """PiSSA and OLoRA become an ordinary LoRA of twice the rank, s·(B·A - B₀·A₀), on the untouched base."""
        if config.init_lora_weights is True:
            return config, tensors
        started = {path: held for path, held in layers.items() if held[1].start_A is not None}
        for path, (module, layer) in started.items():
            term = layer.term(module)
            for factor, values in ((LORA_A, term.A), (LORA_B, term.B)):
                suffix, shaped = layer.kind.in_file(module, factor, values.detach())
                tensors[f"{path}.{suffix}"] = shaped
        update: dict[str, Any] = {"init_lora_weights": True}
        if not started:
            return config.model_copy(update={**update, "eva_config": None, "loftq_config": None}), tensors
        grown = math.sqrt(2) if config.use_rslora else 2.0  # keeps s = alpha / r, or alpha / √r
        update |= {
            "r": 2 * config.r,
            "lora_alpha": grown * config.lora_alpha,
            "rank_pattern": {pattern: 2 * r for pattern, r in config.rank_pattern.items()},
            "alpha_pattern": {pattern: grown * alpha for pattern, alpha in config.alpha_pattern.items()},
        }
        return config.model_copy(update=update), tensors

    def headline(self, config: LoraConfig) -> str:
        """Its alpha."""
        return f"lora_alpha {config.lora_alpha:g}, {super().headline(config)}"


def lora_fields(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of LoRA's kin from a file's config.

    Raises:
        InputError: the factors belong to a base that the initialisation changed, and how is not known.
    """
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise InputError(
            f"the adapter was initialised with {init!r}, and belongs to a base that this changed",
            where=where,
            fix="Save it as an ordinary LoRA with the tool that trained it "
            "(peft: path_initial_model_for_weight_conversion).",
        )
    dropped = {name for name in ("loftq_config", "eva_config") if name in raw}
    dropped |= {name for name in ("rank_pattern", "alpha_pattern") if raw.get(name, 0) is None}
    dropped |= set() if init in _TAKES_OUT else {"init_lora_weights"}
    return {name: value for name, value in raw.items() if name not in dropped}


def plain_lora(config: AdapterConfig, r: int, dropout: float, bias: str) -> LoraConfig:
    """The config of a plain LoRA at scale 1 in the place of another method's adapter, which trains on as that one did.

    Args:
        config: The other method's.
        r: The rank.
        dropout: Of what goes into A.
        bias: As LoRA's is called.
    """
    fields: dict[str, Any] = {name: getattr(config, name) for name in AdapterConfig.model_fields}
    return LoraConfig.model_validate(fields | {"r": r, "lora_alpha": r, "lora_dropout": dropout, "bias": bias})


def whole(alpha: float) -> float | int:
    """An integer where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _check_given(config: LoraConfig, name: str, argument: str, given: object) -> None:
    wanted = config.init_lora_weights == name
    if wanted and given is None:
        raise InputError(f"init_lora_weights: {name} needs `{argument}`", fix=f"Call wrap(..., {argument}=...).")
    if given is not None and not wanted:
        raise InputError(f"`{argument}` is for init_lora_weights: {name}, and the config says otherwise")


def _with_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The config with a rank for each module; the scale stays the one that was asked for, whatever the rank became."""
    alphas = {path: config.rank_and_scale(path)[1] / config.scale(r, 1.0) for path, r in ranks.items()}
    update = {
        "rank_pattern": {path: r for path, r in ranks.items() if r != config.r},
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    }
    return config.model_copy(update=update)
