"""What a layer of an adapter is, and the layer of every low-rank method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, cast

import torch
from torch import nn

from lowrank.adapters.activity import Setting
from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.kind import HostModule, Kind, groups_of, in_place_of_own
from lowrank.adapters.methods.method import Matrix, Method, Outset
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank
from lowrank.ops.merged import merged_weight
from lowrank.ops.precision import precise


class Layer(Protocol):
    """What one adapter puts on one module: an `nn.Module` whose parameters are the adapter's."""

    replaces: bool
    """Whether its output stands in the place of the module's own, instead of adding to it."""

    def output(self, module: HostModule, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output with this layer alone acting."""
        ...

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What this layer adds to the module's own output y."""
        ...

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """peft's names after the module's path, and the tensors (the same storage as the parameters)."""
        ...

    def merge_into(self, module: HostModule) -> None:
        """Writes what the layer stands for into the module's own parameters."""
        ...


class JointLayer:
    """A layer whose effect does not add to the module's output: what several adapters do is worked out together."""

    replaces = False

    def output_together(self, module: HostModule, layers: Sequence[Layer], *args: Any, **kwargs: Any) -> Any:
        """The module's output with all of `layers` acting, this one among them."""
        raise NotImplementedError

    def merge_together(self, module: HostModule, layers: Sequence[Layer]) -> None:
        """Writes what all of `layers` stand for into the module's own parameters."""
        raise NotImplementedError

    def output(self, module: HostModule, *args: Any, **kwargs: Any) -> Any:
        """The module's output with this layer alone acting."""
        return self.output_together(module, [cast("Layer", self)], *args, **kwargs)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """There is none."""
        raise InputError(f"a {type(module).__name__} carries an adapter on its parameters, which cannot be routed")

    def merge_into(self, module: HostModule) -> None:
        """Writes what this layer stands for into the module's own parameters."""
        self.merge_together(module, [cast("Layer", self)])


class SharedTensors(nn.Module):
    """Frozen tensors that all layers of an adapter have in common: one object, a child of each of them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By bare name."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}


class LowRankLayer(nn.Module):
    """One adapter on one module, whose whole effect is a `LowRank` term on the module's matrix, and perhaps a bias.

    Its method says what it holds and what that stands for: each factor is a parameter of its bare name.

    Attributes:
        method: The adapter's.
        kind: The module's.
        matrix: The module's W.
        trained_scale: s of ΔW = s · B · A, as it was trained.
        dropout: The probability that an input of the low-rank path is dropped in training.
        strength: What the scale that was trained is multiplied with; one object for all layers of an adapter.
        bias: What stands in the place of the module's bias; None where that does not train.
    """

    replaces = False

    def __init__(self, method: Method, kind: Kind, matrix: Matrix, scale: float, dropout: float) -> None:
        super().__init__()
        self.method, self.kind, self.matrix = method, kind, matrix
        self.trained_scale, self.dropout = scale, dropout
        self.strength = Setting(1.0)
        self.bias: nn.Parameter | None = None
        self.shared: SharedTensors | None = None

    @classmethod
    def build(
        cls,
        method: Method,
        config: AdapterConfig,
        path: str,
        module: HostModule,
        kind: Kind,
        outset: Outset | None = None,
        shared: SharedTensors | None = None,
    ) -> Self:
        """A layer for the module at `path`, initialised as the config says, on the module's device, in float32.

        Args:
            method: The config's.
            config: What to build.
            path: The module's.
            module: The one that it is for; a float64 weight's factors are float64.
            kind: Its kind.
            outset: What the method has worked out for the whole model.
            shared: Its tensors that all layers share.

        Raises:
            InputError: the method, the rank or the initialisation does not fit the module.
        """
        matrix = matrix_of(path, module, kind)
        layer = cls(method, kind, matrix, method.scale(config, path), method.dropout(config))
        layer.bias, layer.shared = own_bias(config, module), shared
        for name, shape in method.shapes(config, matrix, method.rank(config, path)).items():
            layer.register_parameter(name, _factor_parameter(shape, module))
        with torch.no_grad():
            method.start(layer, config, module, matrix, outset or Outset(config))
        return layer

    @property
    def scale(self) -> float:
        """s of s · B · A as it acts now."""
        return self.trained_scale * self.strength.now

    def factors(self) -> dict[str, torch.Tensor]:
        """The parameters by their bare names ("lora_A"), in two dimensions."""
        return {factor.name: getattr(self, factor.name) for factor in self.method.factors}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same, and those that all layers share."""
        return self.factors() if self.shared is None else {**self.factors(), **self.shared.tensors()}

    def term(self, module: HostModule) -> LowRank:
        """The term that acts on the module's W now."""
        term = self.method.term(self, module)
        return term.dropping(self.dropout) if self.training and self.dropout else term

    def output(self, module: HostModule, x: torch.Tensor) -> torch.Tensor:
        """The module's output with this layer alone acting."""
        return self.kind.fused(module, x, self.term(module), self.acting_bias(module))

    def acting_bias(self, module: HostModule) -> torch.Tensor | None:
        """What stands in the place of the module's bias; that itself, where the layer changes nothing there."""
        bias = getattr(module, "bias", None) if self.bias is None else self.bias
        added = self.method.own_bias(self)
        if added is None:
            return bias
        return added if bias is None else bias + added

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What this layer adds to the module's own output y."""
        added = self.kind.delta(module, x, y, self.term(module))
        bias = self.acting_bias(module)
        if bias is None or bias is module.bias:
            return added
        return added + self.kind.spread(module, in_place_of_own(module, bias)).to(y.dtype)

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """peft's names after the module's path, and the tensors (the same storage as the parameters)."""
        named = dict(self.kind.in_file(module, factor, getattr(self, factor.name)) for factor in self.method.factors)
        if self.bias is not None:
            named["base_layer.bias"] = self.bias
        return named | self.method.more_in_file(self)

    def check_mergeable(self, path: str, module: HostModule) -> None:
        """Raises InputError where the module has no place for what the layer stands for."""
        if obstacle := merge_obstacle(module):
            raise InputError(f"{path} cannot be merged: {obstacle}", fix="Use the adapter without merging it.")
        self.method.check_mergeable(path, self, module)

    @torch.no_grad()
    def merge_into(self, module: HostModule) -> None:
        """Writes what the layer stands for into the module's own parameters."""
        self.kind.write(module, merged_weight(self.kind.weight(module), self.term(module)))
        bias = self.acting_bias(module)
        if bias is not None and bias is not module.bias:
            module.bias = nn.Parameter(bias.to(module.bias.dtype), requires_grad=module.bias.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """As of any module; what the method keeps is made anew."""
        self.method.forget(self)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.method.forget(self)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Method, scale and dropout."""
        return f"{self.method.name}, scale={self.scale:g}, dropout={self.dropout:g}"


def matrix_of(path: str, module: HostModule, kind: Kind) -> Matrix:
    """W of a module, as methods see it."""
    return Matrix(path, *kind.shape(module), groups_of(module), kind.looked_up, kind.linear)


def merge_obstacle(module: HostModule) -> str | None:
    """Why no term of this module can be merged into its weight; None where it can."""
    if groups_of(module) > 1:
        return f"it is a convolution with {module.groups} groups, and its adapter mixes them"
    return None


def _factor_parameter(shape: tuple[int, ...], module: HostModule) -> nn.Parameter:
    """An empty trainable float32 parameter beside the module's weight (float64 beside a float64 one)."""
    return nn.Parameter(torch.empty(shape, device=module.weight.device, dtype=precise(module.weight.dtype)))


def own_bias(config: AdapterConfig, module: HostModule) -> nn.Parameter | None:
    """A trainable copy of the module's bias, where the config says that biases train and there is one."""
    bias = getattr(module, "bias", None)
    if config.bias == "none" or bias is None:
        return None
    return nn.Parameter(bias.detach().clone().to(precise(bias.dtype)))
