"""Modules whose parameters others read without calling them: an adapter there would act on nothing, so none goes there.

`self.q_proj(x)` runs what stands in the module's place; `F.linear(x, self.q_proj.weight)` runs the base's weight. Which
of the two a model does is read off its source (`codewalk`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from lowrank.adapters.modules import ADAPTERS, bare, named_modules
from lowrank.adapters.targeting.code.source import plain_function, static_attribute, tree_of
from lowrank.adapters.targeting.code.walk import CodeWalk
from lowrank.errors import InputError

# In evaluation they hand all weights to one kernel, unless something beneath carries a hook, as adapters do.
_STANDS_ASIDE = (nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward)
_LIBRARIES = ("torch.", "transformers.modeling_utils", "transformers.generation", "transformers.integrations")


class Calls:
    """Who calls the modules of a model, and who reads their parameters past that.

    Args:
        model: Of any class. Its code is read, not run.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(named_modules(model))
        self._modules = {path: module for path, module in modules.items() if ADAPTERS not in path.split(".")}
        self._paths = {module: path for path, module in self._modules.items()}
        self._readers: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._users: dict[nn.Module, set[nn.Module]] = defaultdict(set)
        for module in self._modules.values():
            if module._modules.keys() - {ADAPTERS}:
                self._read_forward(module)
        root = self._modules[""]
        self._called = {root, *self._users, *_used_by_methods(root)}
        for module in [module for module in self._called if not _has_forward(module)]:
            self._called |= set(_held(module))

    def fault(self, path: str, names: Iterable[str] | None = None) -> str | None:
        """Why an adapter on the module at `path` would not act, or in part alone; None where it does.

        Args:
            path: The module's.
            names: Its parameters that the adapter changes; all by default.
        """
        module = self._modules[path]
        reads = [(reader, name) for reader, name in self._readers[module] if names is None or name in names]
        if reads:
            reader, name = min(reads, key=lambda read: read[1] != "weight")
            how = "past its forward" if module in self._called else "and does not call it"
            return f"{type(reader).__name__} reads its {name} {how}"
        return None if module in self._called else self._nothing_calls(path)

    def fault_of_copy(self, path: str) -> str | None:
        """The same of a copy that stands in the place of the module at `path` with all that it holds."""
        module = self._modules[path]
        if not _has_forward(module):
            return f"a {type(module).__name__} is not called, what it holds is"
        inside = {held for held, at in self._paths.items() if at == path or at.startswith(f"{path}.")}
        for held in inside:
            at = self._paths[held]
            for reader, name in self._readers[held]:
                if reader not in inside:
                    return f"{type(reader).__name__} reads {at}.{name} past its forward"
            for user in self._users[held] - inside:
                if held is not module:
                    return f"{type(user).__name__} calls {at} past it"
        return None if module in self._called else self._nothing_calls(path)

    def _read_forward(self, module: nn.Module) -> None:
        forward = type(module).forward
        patched = plain_function(module.__dict__.get("forward"))
        if forward in _STANDS_ASIDE or tree_of(forward) is None:
            self._note(module, [], _held(module))
        elif _has_forward(module):
            walk = CodeWalk(module)
            walk.run(forward)
            if patched is not None and ADAPTERS not in module._modules and not hasattr(module, "_hf_hook"):
                walk.run(module.__dict__["forward"])
            self._note(module, [(read.module, read.name) for read in walk.reads], walk.uses)

    def _note(self, module: nn.Module, reads: Iterable[tuple[nn.Module, str]], uses: Iterable[nn.Module]) -> None:
        for read, name in reads:
            if read is not module:
                self._readers[read].append((module, name))
        for used in uses:
            for each in (used, *(_held(used) if not _has_forward(used) else ())):
                self._users[each].add(module)

    def stand_in(self, path: str) -> str | None:
        """A called module that holds the same weight as the one at `path`, which is there to lend it.

        None where the latter is used: it is called, or something reads its weight there.
        """
        module = self._modules[path]
        weight = module._parameters.get("weight")
        if weight is None or module in self._called or self._readers[module]:
            return None
        same = (at for other, at in self._paths.items() if at != path and other._parameters.get("weight") is weight)
        return next((at for at in same if self._modules[at] in self._called), None)

    def _nothing_calls(self, path: str) -> str:
        other = self.stand_in(path)
        return "nothing calls it" + (f"; {other} holds the same weight" if other else "")


def check_called(calls: Calls, path: str, names: Iterable[str] | None = None) -> None:
    """Raises InputError for a module whose parameters are read past its forward."""
    if why := calls.fault(path, names):
        amount = "in part alone" if why.endswith("past its forward") else "on nothing"
        raise InputError(
            f"an adapter on {path} would act {amount}: {why}",
            fix='Name modules that are called, and leave this one out (target_modules: "all-linear" does).',
        )


def check_copy_called(calls: Calls, path: str) -> None:
    """Raises InputError for a module that is not called as a whole: a copy in its place would not be used."""
    if why := calls.fault_of_copy(path):
        raise InputError(
            f"modules_to_save: a copy of {path} would act on nothing, or in part alone: {why}",
            fix="Name a module that is called as a whole: one around it, or those inside of it.",
        )


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _held(module: nn.Module) -> list[nn.Module]:
    """What a module that is not called itself gives out: its children, and theirs where they are not called either."""
    children = [bare(child) for name, child in module.named_children() if name != ADAPTERS]
    return children + [deeper for child in children if not _has_forward(child) for deeper in _held(child)]


def _used_by_methods(root: nn.Module) -> set[nn.Module]:
    """What the whole model's other methods call (`get_text_features`, `encode`, a training step)."""
    walk = CodeWalk(root)
    for owner in type(root).__mro__:
        if owner.__module__.startswith(_LIBRARIES):
            continue
        for name in vars(owner):
            found = static_attribute(owner, name)
            method = plain_function(found) is not None and not isinstance(found, (staticmethod, classmethod))
            if method and not name.startswith(("_", "set_", "tie_", "resize_")):
                walk.run(found)
    return walk.uses
