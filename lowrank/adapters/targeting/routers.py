"""Which linear layers choose among experts: those that stand beside the experts and have one output for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.kinds.known import kind_of


def routers(modules: Mapping[str, nn.Module]) -> set[str]:
    """The paths of the routers among a model's modules.

    A router is the block's own (`mlp.gate` beside `mlp.experts`), or the one linear layer of a module beside the
    experts (`mlp.router.layer`).

    Args:
        modules: All of the model's, by path.
    """
    linear: dict[str, list[str]] = defaultdict(list)
    for path, module in modules.items():
        kind = kind_of(module)
        if kind is not None and kind.linear:
            linear[path.rpartition(".")[0]].append(path)
    found = set()
    for path, module in modules.items():
        counts = _expert_counts(path, module)
        if not counts:
            continue
        block = path.rpartition(".")[0]
        counts |= _named_counts(modules.get(block))
        beside = [name for name in linear if name.rpartition(".")[0] == block and name != block and name != path]
        alone = [linear[name][0] for name in beside if len(linear[name]) == 1]
        found |= {each for each in [*linear[block], *alone] if modules[each].out_features in counts}
    return found


def _expert_counts(path: str, module: HostModule) -> set[int]:
    """How many experts a module holds, by all that it says of that; empty where it holds none."""
    children = list(module.children())
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        alike = len({type(child) for child in children}) == 1
        return {len(children)} if "expert" in path.rpartition(".")[2] and alike and len(children) > 1 else set()
    stacks = {stack.shape[0] for stack in module._parameters.values() if stack is not None and stack.ndim == 3}
    if stacks and not isinstance(module, _ConvNd):
        return {count for count in stacks if count > 1}
    return _named_counts(module) if path.rpartition(".")[2] == "experts" else set()


def _named_counts(module: nn.Module | None) -> set[int]:
    named = {} if module is None else vars(module)
    return {value for name, value in named.items() if "expert" in name and type(value) is int and value > 1}
