"""Adapters on parameters (`target_parameters`): the fused experts of mixture-of-experts models, (experts, ., .).

Every expert gets an A and a B of its own. An experts module multiplies with its parameters somewhere inside its
forward, in whatever order its architecture wants; so the forward stays the model's own, and runs on a twin of the
module that holds an `AdaptedWeight` in the place of each adapted parameter. A router's weight goes the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from lowrank.adapters.activity import Setting
from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.kinds.known import kind_of
from lowrank.adapters.methods.layer import JointLayer, Layer, own_bias
from lowrank.adapters.methods.lora import LoraConfig
from lowrank.adapters.modules import submodule
from lowrank.adapters.targeting.parameters import find_parameters, parameter_names, parametrised_names
from lowrank.errors import InputError
from lowrank.ops.adapted_weight import AdaptedWeight, teach_compiler
from lowrank.ops.low_rank import LowRank
from lowrank.ops.merged import merged_weight
from lowrank.ops.precision import precise


def is_transposed(module: HostModule) -> bool:
    """Whether files describe the module's stacks as (experts, in, out): peft's rule, by transformers' flag.

    It says which factor is called A. What the module does with the product is its forward's business: Llama 4's experts
    multiply with W from the right and carry no flag.
    """
    return bool(getattr(module, "is_transposed", False))


def expert_factors(
    lora_A: torch.Tensor, lora_B: torch.Tensor, experts: int, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A file's two matrices as two factors for each expert.

    Args:
        lora_A: (experts · r, in), an expert's rows one after another.
        lora_B: (out, r · experts), an expert's columns `experts` apart.
        experts: How many.
        transposed: Whether W is (experts, in, out).

    Returns:
        left (experts, d1, r) and right (experts, r, d2), views, with ΔW = s · left · right for W (experts, d1, d2).
    """
    A = lora_A.view(experts, -1, lora_A.shape[1])
    B = lora_B.t().view(-1, experts, lora_B.shape[0]).transpose(0, 1)
    return (A.mT, B) if transposed else (B.mT, A)


def name_in_file(names: Sequence[str], name: str) -> str:
    """What stands before "lora_A": adapters on several parameters of one module nest in peft, the first one deepest."""
    return "base_layer." * (len(names) - 1 - list(names).index(name))


class ExpertFactors(nn.Module):
    """A and B for every expert of one parameter.

    Attributes:
        lora_A: (experts · r, in), as in the file.
        lora_B: (r · experts, out), the file's transposed: so an expert's B is rows of it.
        strength: What the scale that was trained is multiplied with; one object for all layers of an adapter.
    """

    def __init__(self, shape: torch.Size, transposed: bool, r: int, scale: float, beside: torch.Tensor) -> None:
        super().__init__()
        self.experts, d1, d2 = (1, *shape) if len(shape) == 2 else shape
        self.stacked = len(shape) == 3
        self.transposed, self.trained_scale = transposed and self.stacked, scale
        self.strength = Setting(1.0)
        out_features, in_features = (d2, d1) if self.transposed else (d1, d2)
        dtype = precise(beside.dtype)
        rows = self.experts * r
        self.lora_A = nn.Parameter(torch.empty(rows, in_features, device=beside.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(rows, out_features, device=beside.device, dtype=dtype))

    @property
    def scale(self) -> float:
        """s of s · L · R as it acts now."""
        return self.trained_scale * self.strength.now

    @torch.no_grad()
    def initialise(self, how: bool | str, r: int) -> None:
        """Fills A and B; see `LoraConfig.init_lora_weights`."""
        if how == "gaussian":
            nn.init.normal_(self.lora_A, std=1.0 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if how is False:
            nn.init.kaiming_uniform_(self.lora_B.t(), a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """left (..., d1, r) and right (..., r, d2)."""
        left, right = expert_factors(self.lora_A, self.lora_B.t(), self.experts, self.transposed)
        return (left, right) if self.stacked else (left[0], right[0])

    def in_file(self, prefix: str) -> dict[str, torch.Tensor]:
        """lora_A.weight (experts · r, in) and lora_B.weight (out, r · experts)."""
        return {f"{prefix}lora_A.weight": self.lora_A, f"{prefix}lora_B.weight": self.lora_B.t()}

    def extra_repr(self) -> str:
        """Experts and scale."""
        return f"experts={self.experts}, scale={self.scale:g}"


class ExpertsLayer(JointLayer, nn.ModuleDict):
    """What one adapter puts on the parameters of one module: `ExpertFactors` by the parameter's name.

    Attributes:
        bias: A trained copy of a linear layer's or a convolution's bias, where the config trains biases.
    """

    def __init__(self, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.bias = bias
        teach_compiler()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        teach_compiler()

    def output_together(self, module: HostModule, layers: Sequence[Layer], *args: Any, **kwargs: Any) -> Any:
        """The module's output with all of `layers` acting: their terms add on each parameter."""
        twin = _twin(module, _adapted_weights(module, layers))
        if (bias := _acting_bias(module, layers)) is not None:
            twin.__dict__["bias"] = bias.to(module.bias.dtype)
        return type(twin).forward(twin, *args, **kwargs)

    @torch.no_grad()
    def merge_together(self, module: HostModule, layers: Sequence[Layer]) -> None:
        """W + Σ s·B·A for each expert, summed in float32 and rounded once; the parameters are dense by now."""
        for name, weight in _adapted_weights(module, layers).items():
            merged = torch.empty_like(weight.base)
            tensors = (merged, weight.base, weight.left, weight.right)
            stacks = (tensor if tensor.ndim == 3 else tensor[None] for tensor in tensors)
            for target, W, B, A in zip(*stacks, strict=True):
                target.copy_(merged_weight(W, LowRank(A, B, weight.scale)))
            setattr(module, name, nn.Parameter(merged, requires_grad=weight.base.requires_grad))
        if (bias := _acting_bias(module, layers)) is not None:
            module.bias = nn.Parameter(bias.to(module.bias.dtype), requires_grad=module.bias.requires_grad)

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """lora_A.weight (experts · r, in) and lora_B.weight (out, r · experts), nested where there are several."""
        names = [name for name in parameter_names(module) if name in self]
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensors |= cast("ExpertFactors", self[name]).in_file(name_in_file(names, name))
        if self.bias is not None:
            tensors["base_layer." * len(names) + "bias"] = self.bias
        return tensors


def experts_layers(model: nn.Module, config: AdapterConfig) -> dict[str, ExpertsLayer]:
    """A layer for each module that holds parameters which `target_parameters` names, by its path."""
    if not isinstance(config, LoraConfig):
        return {}
    layers = {}
    for path, names in find_parameters(model, config)[0].items():
        module = submodule(model, path)
        layers[path] = ExpertsLayer(None if kind_of(module) is None else own_bias(config, module))
        for name in names:
            r, scale = config.rank_and_scale(f"{path}.{name}")
            weight = getattr(module, name)
            factors = ExpertFactors(weight.shape, is_transposed(module), r, scale, weight)
            factors.initialise(config.init_lora_weights, r)
            layers[path][name] = factors
    return layers


def _adapted_weights(module: HostModule, layers: Sequence[Layer]) -> dict[str, AdaptedWeight]:
    mine = [layer for layer in layers if isinstance(layer, ExpertsLayer)]
    if len(mine) < len(layers):
        raise InputError(
            f"one adapter trains a {type(module).__name__} whole and another its parameters; they cannot act together"
        )
    names = [name for name in parameter_names(module) if any(name in layer for layer in mine)]
    return {
        name: _adapted(getattr(module, name), [cast("ExpertFactors", layer[name]) for layer in mine if name in layer])
        for name in names
    }


def _acting_bias(module: HostModule, layers: Sequence[Layer]) -> torch.Tensor | None:
    """The module's bias with what the layers changed of it; None where none of them trains it."""
    trained = [layer.bias for layer in layers if isinstance(layer, ExpertsLayer) and layer.bias is not None]
    return module.bias + torch.stack([bias - module.bias for bias in trained]).sum(0) if trained else None


def _adapted(weight: torch.Tensor, acting: list[ExpertFactors]) -> AdaptedWeight:
    if len(acting) == 1:
        return AdaptedWeight(weight, *acting[0].factors(), acting[0].scale)
    pairs = [(left * factors.scale, right) for factors in acting for left, right in [factors.factors()]]
    left, right = torch.cat([left for left, _ in pairs], -1), torch.cat([right for _, right in pairs], -2)
    return AdaptedWeight(weight, left, right, 1.0)


def _twin(module: HostModule, adapted: dict[str, AdaptedWeight]) -> HostModule:
    """An instance of the module's class that shares everything with it but the adapted parameters."""
    own = {name: getattr(module, name) for name in parametrised_names(module) if name not in adapted}
    twin = object.__new__(parametrize.type_before_parametrizations(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(own)
    twin.__dict__.update(adapted)
    return twin
