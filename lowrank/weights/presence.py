"""Whether an adapter is still where it was put: modules that were replaced or resized since have lost it."""

from __future__ import annotations

from torch import nn

from lowrank.adapters import config_of
from lowrank.adapters.copies import WholeCopy
from lowrank.adapters.host import AdapterSet, hosts
from lowrank.adapters.method import LowRankLayer
from lowrank.adapters.targets import find_targets, matches_end
from lowrank.adapters.uncalled import Calls
from lowrank.errors import InputError
from lowrank.weights.adapterfile import shorten


def check_present(model: nn.Module, adapter: str) -> None:
    """Raises InputError for modules that no longer carry what the adapter's config puts on them, or in another size."""
    config = config_of(model, adapter)
    carried = {path for path, _, adapters in hosts(model) if adapter in adapters}
    modules = [path for path, _ in model.named_modules() if path and AdapterSet.CHILD not in path.split(".")]
    wanted = {path for path in modules for name in config.modules_to_save or [] if matches_end(path, name)}
    if config.target_modules:
        wanted |= find_targets(model, config, Calls(model)).modules.keys()
    lost = [path for path in modules if path in wanted - carried]
    if lost:
        raise InputError(
            f"the adapter {adapter!r} is gone from {shorten(lost)}, which was replaced after wrap",
            fix="Resize or replace modules before the model is wrapped (resize_token_embeddings replaces a head).",
        )
    resized = [
        path for path, module, adapters in hosts(model) if adapter in adapters and not _fits(module, adapters, adapter)
    ]
    if resized:
        raise InputError(
            f"{shorten(resized)} has another size than when {adapter!r} was put on it",
            fix="Call resize_token_embeddings before the model is wrapped.",
        )


def _fits(module: nn.Module, adapters: AdapterSet, adapter: str) -> bool:
    layer = adapters.layers()[adapter]
    if isinstance(layer, WholeCopy):
        own = dict(module.named_parameters())
        return all(name in own and own[name].shape == p.shape for name, p in layer.module.named_parameters())
    if isinstance(layer, LowRankLayer) and adapters.kind is not None:
        out, into = adapters.kind.shape(module)
        factors = layer.factors()
        return factors["lora_A"].shape[1] == into and factors["lora_B"].shape[0] == out
    return True
