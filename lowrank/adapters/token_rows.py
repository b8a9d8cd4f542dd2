"""Single rows of an embedding or a head that train (`trainable_token_indices`), for new tokens without a new table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.modules import bare, named_modules
from lowrank.adapters.targeting.matching import matches_end
from lowrank.adapters.targeting.patterns import nearest
from lowrank.adapters.targeting.uncalled import Calls, check_called
from lowrank.errors import InputError
from lowrank.ops.precision import precise


class TokenRows(nn.Module):
    """Trained rows (tokens, dim) in the place of a module's own.

    Attributes:
        obstacle: Why the rows cannot be merged; None where they can.
    """

    replaces = True
    tokens: torch.Tensor
    ascending: torch.Tensor
    order: torch.Tensor

    def __init__(self, module: HostModule, tokens: list[int]) -> None:
        super().__init__()
        given = torch.tensor(tokens, device=module.weight.device)
        ascending, order = given.sort()
        self._places = {token: place for place, token in enumerate(sorted(tokens))}
        self.register_buffer("tokens", given, persistent=False)
        self.register_buffer("ascending", ascending, persistent=False)
        self.register_buffer("order", order, persistent=False)
        weight = module.weight.detach()[given]
        self.rows = nn.Parameter(weight.to(precise(weight.dtype)))
        self.obstacle: str | None = None

    def output(self, module: HostModule, x: torch.Tensor) -> torch.Tensor:
        """The module's own output, but for what the trained rows give."""
        y = type(module).forward(module, x)
        return self._looked_up(module, x, y) if isinstance(module, nn.Embedding) else self._logits(module, x, y)

    def _looked_up(self, module: HostModule, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        place = torch.searchsorted(self.ascending, ids).clamp_(max=len(self.tokens) - 1)
        padding = self._places.get(module.padding_idx)  # torch gives it no gradient
        rows = F.embedding(place, self.rows[self.order], padding, scale_grad_by_freq=module.scale_grad_by_freq)
        rows, scale = rows.to(y.dtype), getattr(module, "embed_scale", None)
        if scale is not None:
            rows = rows * (scale.to(y.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where((self.ascending[place] == ids)[..., None], rows, y)

    def _logits(self, module: HostModule, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        bias = None if module.bias is None else module.bias[self.tokens]
        logits = F.linear(hidden, self.rows.to(hidden.dtype), bias)
        return y.index_copy(-1, self.tokens, logits.to(y.dtype))

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What that output is beside the module's own y."""
        return self.output(module, x) - y

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """peft's name; rows in the order that the config names their tokens in."""
        return {"token_adapter.trainable_tokens_delta": self.rows}

    def check_mergeable(self, path: str, module: HostModule) -> None:
        """Raises InputError where other modules would have to be parted from this one."""
        if self.obstacle is not None:
            raise InputError(f"{path} cannot be merged: {self.obstacle}", fix="Use the adapter without merging it.")

    @torch.no_grad()
    def merge_into(self, module: HostModule) -> None:
        """Into a new weight: what follows gets an equal one, and shares it again (see `Ties`)."""
        weight = module.weight.detach().clone()
        weight[self.tokens] = self.rows.to(weight.dtype)
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)


class SharedTokens(nn.Module):
    """The rows of another module, on one that is tied to it."""

    replaces = True

    def __init__(self, rows: TokenRows) -> None:
        super().__init__()
        self.rows = rows

    def output(self, module: HostModule, x: torch.Tensor) -> torch.Tensor:
        """The same, with the other module's rows."""
        return self.rows.output(module, x)

    def delta(self, module: HostModule, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The same, with the other module's rows."""
        return self.rows.delta(module, x, y)

    def in_file(self, module: HostModule) -> dict[str, torch.Tensor]:
        """Nothing: the other module's layer holds the rows."""
        return {}

    def merge_into(self, module: HostModule) -> None:
        """The same rows."""
        self.rows.merge_into(module)


@dataclass(frozen=True, slots=True)
class TokenPlace:
    """What `trainable_token_indices` means for one module.

    Attributes:
        tokens: The rows that train, in the config's order.
        followers: The paths of modules with the same weight that act with these rows too.
        alone: Whether another module has the same weight and does not follow.
        obstacle: Why such rows cannot be merged; None where they can.
    """

    tokens: list[int]
    followers: frozenset[str]
    alone: bool
    obstacle: str | None


def find_token_places(model: HostModule, config: AdapterConfig) -> dict[str, TokenPlace]:
    """The modules whose rows train, by path.

    What is tied to the input embedding follows it, unless the config gives it tokens of its own (peft's rule).

    Raises:
        InputError: a name that is no embedding or head.
    """
    asked = _asked(model, config)
    modules = dict(named_modules(model))
    first = find_input_embedding(model)
    places: dict[str, TokenPlace] = {}
    for path, tokens in asked.items():
        tied = set(tied_to(modules, path))
        same = {other for other in tied if asked.get(other) == tokens}
        if first in same:
            continue  # it follows the input embedding
        followers = same | (tied - asked.keys()) if path == first else set()
        apart = sorted(tied - followers)
        obstacle = f"its weight is that of {', '.join(apart)} too, which would have to be parted from it"
        refused = bool(apart) and len(tied) > 1
        places[path] = TokenPlace(tokens, frozenset(followers), bool(apart), obstacle if refused else None)
    return places


def token_layers(model: HostModule, config: AdapterConfig, calls: Calls) -> dict[str, nn.Module]:
    """The layers that `trainable_token_indices` asks for, by module path.

    Raises:
        InputError: a name that is no embedding or head, a token beyond the table, a module that nothing calls.
    """
    modules = dict(named_modules(model))
    layers: dict[str, nn.Module] = {}
    for path, place in find_token_places(model, config).items():
        module: HostModule = modules[path]
        _check_indices(path, module, place.tokens)
        if not place.followers:
            check_called(calls, path)
        layers[path] = rows = TokenRows(module, place.tokens)
        rows.obstacle = place.obstacle
        layers |= {other: _follower(path, other, modules[other], rows) for other in place.followers}
    return layers


def find_input_embedding(model: HostModule) -> str | None:
    """The path of the model's input embedding; None for a model that does not say which that is."""
    try:
        embedding = bare(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, module in named_modules(model) if module is embedding), None)


def tied_to(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """The paths of the other modules that have the same weight."""
    weight = modules[path]._parameters["weight"]
    return [other for other, module in modules.items() if other != path and module._parameters.get("weight") is weight]


def _asked(model: HostModule, config: AdapterConfig) -> dict[str, list[int]]:
    """Which tokens of which modules; a name stands for every module that it ends the path of."""
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return {}
    if not isinstance(wanted, dict):
        wanted = {find_input_embedding(model) or "embed_tokens": wanted}
    asked: dict[str, list[int]] = {}
    for name, indices in wanted.items():
        found = [
            path
            for path, module in named_modules(model)
            if matches_end(path, name) and isinstance(module, nn.Embedding | nn.Linear)
        ]
        if not found:
            raise InputError(
                f"trainable_token_indices: {name!r} names no embedding and no head; {nearest(name, _tables(model))}"
            )
        if twice := [path for path in found if path in asked]:
            raise InputError(f"trainable_token_indices: {twice[0]} is named twice")
        asked |= dict.fromkeys(found, indices)
    return asked


def _tables(model: nn.Module) -> list[str]:
    return [path for path, module in named_modules(model) if isinstance(module, nn.Embedding)]


def _check_indices(path: str, module: HostModule, indices: list[int]) -> None:
    held = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
    if outside := [index for index in indices if not 0 <= index < held]:
        raise InputError(f"trainable_token_indices: {path} has no tokens {outside}; it holds {held}")
    if len(set(indices)) < len(indices):
        raise InputError(f"trainable_token_indices: a token of {path} is named twice")


def _follower(path: str, other: str, module: nn.Module, rows: TokenRows) -> SharedTokens:
    if not isinstance(module, nn.Embedding | nn.Linear):
        raise InputError(
            f"trainable_token_indices: {path} is tied to {other}, which would not see the trained rows",
            fix="Untie the two, or train the embeddings whole (modules_to_save).",
        )
    return SharedTokens(rows)
