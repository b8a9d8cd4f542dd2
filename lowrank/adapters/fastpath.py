"""torch's `nn.TransformerEncoder` in evaluation: padded batches as nested tensors, which adapted layers do not take."""

from __future__ import annotations

from torch import nn

from lowrank.adapters.install import hosts

_SETTING, _MARK = "use_nested_tensor", "_lowrank_nested"


def take_dense(model: nn.Module) -> None:
    """Has each encoder that carries an adapter leave padded batches as they are."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, _SETTING, False) and any(hosts(encoder)):
            setattr(encoder, _SETTING, False)
            encoder.__dict__[_MARK] = True


def give_back(model: nn.Module) -> None:
    """Undoes `take_dense`."""
    for encoder in model.modules():
        if encoder.__dict__.pop(_MARK, False):
            setattr(encoder, _SETTING, True)
