"""The modules of a model by path, named without what only wraps them: torch.compile, DDP, FSDP, checkpoints.

Adapters go into the modules themselves, and files name those. So whoever walks over a model does it here.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lowrank.adapters.kinds.kind import HostModule

ADAPTERS = "adapters"
"""The child of a module that holds its adapters."""

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def bare(model: nn.Module) -> HostModule:
    """The module inside of its wrappers; itself where it has none."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return module.module
    held = module._modules
    return next((held[name] for name in _WRAPPED if held.get(name) is not None), None)


def named_modules(model: nn.Module) -> Iterator[tuple[str, HostModule]]:
    """Every module once, the model itself first under ""; adapters included."""
    return _walk(bare(model), "", set(), "")


def hosting_modules(model: nn.Module) -> Iterator[tuple[str, HostModule]]:
    """The same without adapters: the time that it takes is the base's, however many are loaded."""
    return _walk(bare(model), "", set(), ADAPTERS)


def _walk(module: nn.Module, path: str, seen: set[nn.Module], but: str) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != but:
            yield from _walk(bare(child), f"{path}.{name}".lstrip("."), seen, but)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base by path, without the model itself and without adapters."""
    return {path: module for path, module in named_modules(model) if path and ADAPTERS not in path.split(".")}


def submodule(model: nn.Module, path: str) -> HostModule:
    """The module at a path of `named_modules`."""
    module = bare(model)
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            raise AttributeError(f"a {type(module).__name__} has no module {name!r}")
        module = bare(child)
    return module


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, under its module's path."""
    seen: set[int] = set()
    for path, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}".lstrip("."), parameter
