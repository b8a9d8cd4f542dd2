"""Single rows of an embedding that train (`trainable_token_indices`), for new tokens without a new table."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds import HostModule, Kind
from lowrank.adapters.method import precise
from lowrank.adapters.uncalled import check_called
from lowrank.errors import InputError


class TokenRows(nn.Module):
    """Trained rows (tokens, dim) in the place of an embedding's own."""

    tokens: torch.Tensor
    ascending: torch.Tensor
    order: torch.Tensor

    def __init__(self, module: HostModule, tokens: list[int]) -> None:
        super().__init__()
        given = torch.tensor(tokens, device=module.weight.device)
        ascending, order = given.sort()
        self.register_buffer("tokens", given, persistent=False)
        self.register_buffer("ascending", ascending, persistent=False)
        self.register_buffer("order", order, persistent=False)
        weight = module.weight.detach()[given]
        self.rows = nn.Parameter(weight.to(precise(weight.dtype)))

    def output(self, module: HostModule, kind: Kind | None, ids: torch.Tensor) -> torch.Tensor:
        """See `Layer.output`."""
        y = type(module).forward(module, ids)
        place = torch.searchsorted(self.ascending, ids).clamp_(max=len(self.tokens) - 1)
        rows = self.rows[self.order[place]].to(y.dtype)
        scale = getattr(module, "embed_scale", None)
        if scale is not None:
            rows = rows * (scale.to(y.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where((self.ascending[place] == ids)[..., None], rows, y)

    def delta(self, module: HostModule, kind: Kind | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Layer.delta`."""
        return self.output(module, kind, x) - y

    def in_file(self, module: HostModule, kind: Kind | None) -> dict[str, torch.Tensor]:
        """peft's name; rows in the order that the config names their tokens in."""
        return {"token_adapter.trainable_tokens_delta": self.rows}

    @torch.no_grad()
    def merge_into(self, module: HostModule, kind: Kind | None) -> None:
        """In place, so that a tied head follows."""
        module.weight.data[self.tokens] = self.rows.to(module.weight.dtype)


class TokenColumns(nn.Module):
    """The same rows as a tied head sees them: the logits of their tokens."""

    def __init__(self, rows: TokenRows) -> None:
        super().__init__()
        self.rows = rows

    def output(self, module: HostModule, kind: Kind | None, hidden: torch.Tensor) -> torch.Tensor:
        """See `Layer.output`."""
        y = type(module).forward(module, hidden)
        bias = None if module.bias is None else module.bias[self.rows.tokens]
        logits = nn.functional.linear(hidden, self.rows.rows.to(hidden.dtype), bias)
        return y.index_copy(-1, self.rows.tokens, logits)

    def delta(self, module: HostModule, kind: Kind | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Layer.delta`."""
        return self.output(module, kind, x) - y

    def in_file(self, module: HostModule, kind: Kind | None) -> dict[str, torch.Tensor]:
        """Nothing: the embedding's layer holds the rows."""
        return {}

    def merge_into(self, module: HostModule, kind: Kind | None) -> None:
        """Nothing: the weight is the embedding's, which its own layer writes."""


def token_layers(model: HostModule, config: AdapterConfig) -> dict[str, nn.Module]:
    """The layers that `trainable_token_indices` asks for, by module path.

    Raises:
        InputError: a name that is no embedding, or a token beyond the table.
    """
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return {}
    paths = {id(module): path for path, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    by_name = wanted if isinstance(wanted, dict) else {paths[id(embedding)]: wanted}
    layers: dict[str, nn.Module] = {}
    for name, indices in by_name.items():
        path, module = _find_embedding(model, name)
        _check_tied(model, path, module)
        if outside := [index for index in indices if not 0 <= index < module.num_embeddings]:
            raise InputError(
                f"trainable_token_indices: {path} has no tokens {outside}; it holds {module.num_embeddings}"
            )
        if len(set(indices)) < len(indices):
            raise InputError(f"trainable_token_indices: a token of {path} is named twice")
        layers[path] = rows = TokenRows(module, indices)
        if (head := _tied_head(model, module)) is not None:
            layers[paths[id(head)]] = TokenColumns(rows)
    return layers


def _tied_head(model: HostModule, embedding: HostModule) -> nn.Module | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if getattr(head, "weight", None) is embedding.weight else None


def _check_tied(model: nn.Module, path: str, embedding: HostModule) -> None:
    """Its rows are the embedding's and a tied head's; a third module with the same weight would not see them."""
    modules = dict(model.named_modules())
    check_called(path, modules)
    known = (embedding, _tied_head(model, embedding))
    for other, module in modules.items():
        if module._parameters.get("weight") is embedding.weight and not any(module is one for one in known):
            raise InputError(
                f"trainable_token_indices: {path} is tied to {other}, which would not see the trained rows",
                fix="Untie the two, or train the embeddings whole (modules_to_save).",
            )


def _find_embedding(model: nn.Module, name: str) -> tuple[str, nn.Embedding]:
    found = [
        (path, module)
        for path, module in model.named_modules()
        if (path == name or path.endswith(f".{name}")) and isinstance(module, nn.Embedding)
    ]
    if len(found) != 1:
        raise InputError(f"trainable_token_indices: {name!r} names {len(found)} embeddings; it must name one")
    return found[0]
