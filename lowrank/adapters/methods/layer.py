"""What a layer of an adapter is, and the part that every low-rank method shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, cast

import torch
from torch import nn

from lowrank.adapters.activity import Setting
from lowrank.adapters.config import AdapterConfig, LoraConfig
from lowrank.adapters.kinds.kind import HostModule, Kind, groups_of, in_place_of_own
from lowrank.adapters.targeting.targets import pattern_value
from lowrank.errors import InputError
from lowrank.ops.low_rank import LowRank
from lowrank.ops.merged import merged_weight
from lowrank.ops.precision import precise


class Layer(Protocol):
    """What one adapter puts on one module: an `nn.Module` whose parameters are the adapter's."""

    replaces: bool
    """Whether its output stands in the place of the module's own, instead of adding to it."""

    def output(self, module: HostModule, kind: Kind | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output with this layer alone acting."""
        ...

    def delta(self, module: HostModule, kind: Kind | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What this layer adds to the module's own output y."""
        ...

    def in_file(self, module: HostModule, kind: Kind | None) -> dict[str, torch.Tensor]:
        """peft's names after the module's path, and the tensors (the same storage as the parameters)."""
        ...

    def merge_into(self, module: HostModule, kind: Kind | None) -> None:
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

    def output(self, module: HostModule, kind: Kind | None, *args: Any, **kwargs: Any) -> Any:
        """See `Layer.output`."""
        return self.output_together(module, [cast("Layer", self)], *args, **kwargs)

    def delta(self, module: HostModule, kind: Kind | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """There is none."""
        raise InputError(f"a {type(module).__name__} carries an adapter on its parameters, which cannot be routed")

    def merge_into(self, module: HostModule, kind: Kind | None) -> None:
        """See `Layer.merge_into`."""
        self.merge_together(module, [cast("Layer", self)])


class LowRankLayer(nn.Module):
    """A layer whose whole effect is a `LowRank` term on the module's matrix, and perhaps a bias of its own.

    A new method is a subclass with `build`, `from_file`, `term` and `factors`, and one entry in `registry.METHODS`.

    Attributes:
        strength: What the scale that was trained is multiplied with; one object for all layers of an adapter.
    """

    replaces = False

    def __init__(self, scale: float, dropout: float, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.trained_scale, self.dropout = scale, dropout
        self.strength = Setting(1.0)
        self.bias = bias

    @property
    def scale(self) -> float:
        """s of s · B · A as it acts now."""
        return self.trained_scale * self.strength.now

    @classmethod
    def build(cls, config: Any, path: str, module: HostModule, kind: Kind) -> Self:
        """A layer for the module at `path`, initialised as the config says, on the module's device, in float32."""
        raise NotImplementedError

    @staticmethod
    def from_file(config: Any, path: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> LowRank:
        """The term that one module's tensors in a file stand for, without a model.

        Args:
            config: As read from the file's folder.
            path: The module's path.
            tensors: By bare name ("lora_A"), in two dimensions.
            weight: The base's W (out, in), dense.
        """
        raise NotImplementedError

    def term(self, module: HostModule, kind: Kind) -> LowRank:
        """The term that acts on the module's W now."""
        raise NotImplementedError

    def factors(self) -> dict[str, torch.Tensor]:
        """The parameters by their bare names ("lora_A"), in two dimensions."""
        raise NotImplementedError

    def output(self, module: HostModule, kind: Kind, x: torch.Tensor) -> torch.Tensor:
        """See `Layer.output`."""
        return kind.fused(module, x, self.term(module, kind), self.acting_bias(module))

    def acting_bias(self, module: HostModule) -> torch.Tensor | None:
        """What stands in the place of the module's bias; that itself, where the layer has none of its own."""
        return getattr(module, "bias", None) if self.bias is None else self.bias

    def delta(self, module: HostModule, kind: Kind, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Layer.delta`."""
        added = kind.delta(module, x, y, self.term(module, kind))
        bias = self.acting_bias(module)
        if bias is None or bias is module.bias:
            return added
        return added + kind.spread(module, in_place_of_own(module, bias)).to(y.dtype)

    def in_file(self, module: HostModule, kind: Kind) -> dict[str, torch.Tensor]:
        """See `Layer.in_file`."""
        named = dict(kind.in_file(module, name, factor) for name, factor in self.factors().items())
        return named if self.bias is None else {**named, "base_layer.bias": self.bias}

    def check_mergeable(self, path: str, module: HostModule) -> None:
        """Raises InputError where the module has no place for what the layer stands for."""
        if obstacle := merge_obstacle(module):
            raise InputError(f"{path} cannot be merged: {obstacle}", fix="Use the adapter without merging it.")

    @torch.no_grad()
    def merge_into(self, module: HostModule, kind: Kind) -> None:
        """See `Layer.merge_into`."""
        kind.write(module, merged_weight(kind.weight(module), self.term(module, kind)))
        bias = self.acting_bias(module)
        if bias is not None and bias is not module.bias:
            module.bias = nn.Parameter(bias.to(module.bias.dtype), requires_grad=module.bias.requires_grad)

    def extra_repr(self) -> str:
        """Scale and dropout."""
        return f"scale={self.scale:g}, dropout={self.dropout:g}"


def merge_obstacle(module: HostModule) -> str | None:
    """Why no term of this module can be merged into its weight; None where it can."""
    if groups_of(module) > 1:
        return f"it is a convolution with {module.groups} groups, and its adapter mixes them"
    return None


def factor_shapes(kind: Kind, module: HostModule, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B for a module.

    Raises:
        InputError: r cannot be shared out among the groups of a convolution.
    """
    out_features, in_features = kind.shape(module)
    if r % (groups := groups_of(module)):
        raise InputError(
            f"r is {r}, and a convolution with {groups} groups takes a multiple of {groups}",
            fix="Give it a rank of its own in rank_pattern, or do not adapt it.",
        )
    return (r, in_features), (out_features, r // groups)


def factor_parameter(shape: tuple[int, ...], module: HostModule) -> nn.Parameter:
    """An empty trainable float32 parameter beside the module's weight (float64 beside a float64 one)."""
    return nn.Parameter(torch.empty(shape, device=module.weight.device, dtype=precise(module.weight.dtype)))


def own_bias(config: AdapterConfig, module: HostModule) -> nn.Parameter | None:
    """A trainable copy of the module's bias, where the config says that biases train and there is one."""
    bias = getattr(module, "bias", None)
    if config.bias == "none" or bias is None:
        return None
    return nn.Parameter(bias.detach().clone().to(precise(bias.dtype)))


def rank_and_scale(config: LoraConfig, path: str) -> tuple[int, float]:
    """r and s of the module at `path`, by the config's patterns."""
    r = pattern_value(config.rank_pattern, path, config.r)
    return r, config.scale(r, pattern_value(config.alpha_pattern, path, config.lora_alpha))
