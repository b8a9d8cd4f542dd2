"""Weights that several modules share: kept shared where a merge left them equal, and told to the model where not."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.adapters.modules import bare, base_modules, named_modules, submodule

_FLAG = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Parting:
    """Tied parameters that get tensors of their own.

    Attributes:
        targets: Their names.
        flag_off: Whether the config then says that nothing is tied.
    """

    targets: frozenset[str]
    flag_off: bool


class Ties:
    """What is shared in a model before its weights are written.

    Args:
        model: Wrapped or not; what adapters hold is left aside.
    """

    def __init__(self, model: nn.Module) -> None:
        named = defaultdict(list)
        for path, module in ("", bare(model)), *base_modules(model).items():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    named[id(parameter)].append(f"{path}.{name}".lstrip("."))
        self.model = model
        self.groups = [names for names in named.values() if len(names) > 1]
        self.declared = _declared(model)

    @torch.no_grad()
    def settle(self) -> None:
        """Shares again what is still equal, and says in the configs what is no longer shared.

        The flag governs all ties of a model: where one is broken the others are dissolved into equal weights. A model
        that uses the flag for something else as well (T5's scaled outputs) keeps it: what is saved then holds both
        weights, which transformers does not tie where they differ.
        """
        for names in self.groups:
            self._share(names)
        for owners in self._by_config():
            pairs = self._pairs(owners)
            broken = {target for target, source in pairs.items() if self._get(target) is not self._get(source)}
            if not broken:
                continue
            if _flag_only_ties(owners):
                broken = set(pairs)
                config = next(iter(owners.values())).config
                for one in (config, config.get_text_config()):
                    setattr(one, _FLAG, False)
            self._part(sorted(broken), {pairs[target] for target in broken})
            for path, owner in owners.items():
                self._forget(owner, path, broken)

    def parting(self, changed: set[str]) -> Parting:
        """What `settle` would part and say if only these targets had values of their own.

        A config inside of the model's, other than its text model's, is left as it is: what is saved then holds both.
        """
        own = _with_text(bare(self.model).config)
        targets, off = set[str](), False
        for owners in self._by_config():
            pairs = self._pairs(owners)
            if broken := changed & pairs.keys():
                config = next(iter(owners.values())).config
                turned = any(config is one for one in own) and _flag_only_ties(owners)
                targets |= set(pairs) if turned else broken
                off |= turned
        return Parting(frozenset(targets), off)

    def _pairs(self, owners: dict[str, Any]) -> dict[str, str]:
        return {target: source for path in owners for target, source in self.declared[path].items()}

    def _part(self, targets: list[str], sources: set[str]) -> None:
        """Gives each target a tensor of its own."""
        taken = {id(self._get(source)) for source in sources}
        for target in targets:
            if id(mine := self._get(target)) in taken:
                self._set(target, nn.Parameter(mine.detach().clone(), requires_grad=False))
            taken.add(id(self._get(target)))

    def _by_config(self) -> list[dict[str, Any]]:
        """The models inside of this one, by their paths, those together that read one config."""
        found: dict[int, dict[str, Any]] = defaultdict(dict)
        for path in self.declared:
            owner: Any = submodule(self.model, path)
            found[id(owner.config)][path] = owner
        return list(found.values())

    def _share(self, names: list[str]) -> None:
        kept: list[torch.Tensor] = []
        for name in names:
            mine = self._get(name)
            like = next((one for one in kept if _equal(one, mine)), None)
            if like is None:
                kept.append(mine)
            elif like is not mine:
                self._set(name, like)

    def _forget(self, owner: Any, path: str, targets: set[str]) -> None:
        """Has transformers not tie them again when the model is resized."""
        prefix = f"{path}." if path else ""
        kept = {target: source for target, source in self.declared[path].items() if target not in targets}
        if len(kept) < len(self.declared[path]):
            owner._tied_weights_keys = {t.removeprefix(prefix): s.removeprefix(prefix) for t, s in kept.items()} or None
        for module, cut in ((bare(self.model), ""), (owner, prefix)):
            known = getattr(module, "all_tied_weights_keys", {})
            for target in targets:
                known.pop(target.removeprefix(cut), None)

    def _get(self, name: str) -> torch.Tensor:
        path, _, last = name.rpartition(".")
        return getattr(submodule(self.model, path), last)

    def _set(self, name: str, value: torch.Tensor) -> None:
        path, _, last = name.rpartition(".")
        setattr(submodule(self.model, path), last, value)


def _declared(model: nn.Module) -> dict[str, dict[str, str]]:
    """By transformers' own account: for each model inside of this one by its path, {target: source}."""
    found = {}
    for path, module in named_modules(model):
        if isinstance(module, PreTrainedModel):
            prefix = f"{path}." if path else ""
            keys = module.get_expanded_tied_weights_keys(all_submodels=False)
            found[path] = {f"{prefix}{target}": f"{prefix}{source}" for target, source in keys.items()}
    return found


def _with_text(config: Any) -> list[Any]:
    try:
        return [config, config.get_text_config()]
    except ValueError:  # several that could be meant
        return [config]


def _flag_only_ties(owners: dict[str, Any]) -> bool:
    return all(_only_ties(owner) for owner in owners.values())


def _only_ties(model: Any) -> bool:
    """Whether the model, and its config when it is read again, use the flag for nothing but the tie."""
    if f"config.{_FLAG}" in inspect.getsource(type(model).forward):
        return False
    before = model.config.to_dict()
    after = type(model.config).from_dict({**before, _FLAG: False}).to_dict()
    return after.get(_FLAG) is False and {**before, _FLAG: False} == after


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first is second:
        return True
    alike = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    return alike and torch.equal(first, second)
