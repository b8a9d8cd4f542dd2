"""Proof before a run that the segments of a pack do not see one another, and are computed as they would be alone.

Rounding must not decide. Products of other shapes round otherwise, a mixture of experts multiplies at once what all
segments send to an expert, and where a router's scores are close a last digit sends a token to another expert: after
many layers in 16 bits right packs differ by as much as wrong ones. So two questions are asked that rounding does not
answer:

- Do logits depend on another segment's tokens? Where they stay the same to the bit they do not. Where they change their
  gradient tells: it is exactly 0 where a mask leaves a token out, however what is left in was rounded.
- Does each layer give packed what it gives apart? Apart, every layer is handed the states that it had in the pack, so
  the roundings of a single layer are compared, and of a segment's tokens the one in the middle counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank.attention.forest import positions_of
from lowrank.attention.packing import cannot_share, segments
from lowrank.attention.spans import Spans, from_lengths
from lowrank.errors import InputError

# Two segments; what the first says must not change the second.
_LENGTHS = (7, 5)
# A beginning, two ends of it, and an end of the first of them that does not stand beside it.
_TREE, _PARENTS = (7, 5, 6, 4), (-1, 0, 0, 1)
# Norm of the difference of a token's states after one layer, as a share of their norm.
_APART = {torch.float32: 1e-4, torch.float64: 1e-4}
_APART_16_BITS = 3e-2

_States = dict[int, torch.Tensor]  # (..., tokens, hidden), by the number of the layer's call


def check_packing(model: PreTrainedModel) -> None:
    """Prove on two short segments that the model, as it is configured, can train on packs.

    The second segment's logits must not depend on the tokens of the first, and each layer must give both segments what
    it gives each of them alone.

    Raises:
        InputError: They do, or it does not: in this architecture the segments of a pack see one another, or lose their
            positions.
    """
    row = from_lengths(_LENGTHS, None)
    with _evaluating(model):
        seen, found, states = _looked_at(model, row, None)
        apart = max(_difference(model, found, states, row, [number], positions=True) for number in range(len(_LENGTHS)))
    if not seen == 0:
        raise _cannot_pack(model, f"one example changes the logits of the next by {seen:.1e} of their size")
    if not apart <= _APART.get(model.dtype, _APART_16_BITS):
        raise _cannot_pack(model, f"packed, a layer's states differ by {apart:.1e} of their size from those apart")


def check_sharing(model: PreTrainedModel) -> None:
    """Prove on a short tree that the model, as it is configured, can compute what examples begin with once for all.

    No segment's logits must depend on the tokens of one that is not its ancestor, and each layer must give each path
    what it gives it alone.

    Raises:
        InputError: They do, or it does not, or the model's attention takes no segments with parents.
    """
    row = from_lengths(_TREE, None, _PARENTS)
    with _evaluating(model):
        seen, found, states = _looked_at(model, row, _PARENTS)
        # Without position_ids: a model that counts from elsewhere than 0 does so here.
        apart = max(_difference(model, found, states, row, path, positions=False) for path in ([0, 1, 3], [0, 2]))
    if not seen == 0:
        raise cannot_share(model, f"one example changes the logits of another by {seen:.1e} of their size")
    if not apart <= _APART.get(model.dtype, _APART_16_BITS):
        raise cannot_share(model, f"shared, a layer's states differ by {apart:.1e} of their size from those apart")


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _cannot_pack(model: PreTrainedModel, what: str) -> InputError:
    return InputError(
        f"{type(model).__name__} with attention `{model.config._attn_implementation}` cannot train on packs: {what}",
        fix="Set `data.packing: false`, which pads each example to its own row.",
    )


def _looked_at(
    model: PreTrainedModel, row: Spans, parents: Sequence[int] | None
) -> tuple[float, torch.Tensor, _States]:
    """How much logits change with the tokens of segments that they must not depend on, the logits (1, tokens,
    vocabulary), and what each layer was given."""
    states: _States = {}
    ids = _ids(model, row.length, 0)
    with _layers_asked(model, row.length, states.setdefault):
        found = _logits(model, ids, row, parents).detach()
    changes = [0.0]
    for changed, (start, end) in enumerate(row.spans):
        others = [n for n in range(len(row.spans)) if n != changed and changed not in row.path(n)]
        if not others:
            continue
        outside = torch.cat([torch.arange(*row.spans[n]) for n in others]).to(found.device)
        another = ids.clone()
        another[:, start:end] = _ids(model, row.length, 1)[:, start:end]
        after = _logits(model, another, row, parents).detach()
        change = _share(after[:, outside], found[:, outside])
        # A base in shards is gathered by all processes at once: none may leave a pass out that another takes.
        if (change != 0 or _joined()) and _depend(model, ids, row, parents, outside, slice(start, end)):
            changes.append(change)
    return float(torch.tensor(changes).max()), found, states


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _depend(
    model: PreTrainedModel,
    ids: torch.Tensor,
    row: Spans,
    parents: Sequence[int] | None,
    outside: torch.Tensor,
    changed: slice,
) -> bool:
    """Whether the gradient of logits `outside` of a segment, by its embeddings, is anything but 0."""
    leaves: list[torch.Tensor] = []

    def cut(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1].clone()  # some models scale it in place

    embedding: Any = model.get_input_embeddings()
    hook = embedding.register_forward_hook(cut)
    try:
        logits = _logits(model, ids, row, parents)[:, outside]
        weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device) / logits.shape[-1] ** 0.5
        gradients = torch.autograd.grad((logits * weights).sum(), leaves, allow_unused=True)
    except InputError:  # FlexAttention has no backward pass on a CPU: nothing proves that it was rounding
        return True
    finally:
        hook.remove()
    return not leaves or any(g is not None and bool((g[:, changed] != 0).any()) for g in gradients)


def _difference(
    model: PreTrainedModel, found: torch.Tensor, states: _States, row: Spans, path: Sequence[int], *, positions: bool
) -> float:
    """How far what a layer gives a path's segments in the pack is from what it gives the path alone: the most of all
    layers and segments. Alone, each layer goes on from the states that it had in the pack."""
    place = torch.cat([torch.arange(*row.spans[number]) for number in path]).to(found.device)
    lengths = [row.lengths[number] for number in path]
    ids = _ids(model, found.shape[1], 0)[:, place]
    arrived: list[torch.Tensor] = []

    def handed(number: int, own: torch.Tensor) -> torch.Tensor | None:
        given = states.get(number)
        if given is None:
            return None
        given = given.index_select(-2, place.to(given.device))
        arrived.append(_middle(given, own, lengths))
        return given

    with _layers_asked(model, len(place), handed):
        alone = from_lengths((len(place),), None)
        logits = _logits(model, ids, alone, None) if positions else model(input_ids=ids, use_cache=False).logits.float()
    arrived.append(_middle(found[:, place], logits.detach(), lengths))
    return float(torch.stack([each.cpu() for each in arrived]).max())


def _middle(found: torch.Tensor, expected: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The median over a segment's tokens, of the segment where it is largest: a router that sends one token to another
    expert does not count, what is wrong for most does."""
    found, expected = found.float(), expected.float()
    shares = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    shares = torch.where(found.eq(expected).all(-1), 0.0, shares)  # zeros that are the same
    return torch.stack([part.flatten().median() for part in shares.split(lengths, dim=-1)]).max()


@contextmanager
def _layers_asked(
    model: PreTrainedModel, tokens: int, ask: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """While it lasts each layer is asked as it is called: `ask(number of the call, states (..., tokens, hidden))`; what
    it answers takes their place."""
    calls = count()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        states = args[0] if args else kwargs.get("hidden_states")
        number = next(calls)
        if not isinstance(states, torch.Tensor) or states.dim() < 2 or states.shape[-2] != tokens:
            return None
        others = ask(number, states.detach())
        if others is None:
            return None
        return ((others, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": others})

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _share(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _ids(model: PreTrainedModel, tokens: int, shift: int) -> torch.Tensor:
    """(1, tokens) ids spread over the vocabulary, the same at every run and without a change of the random state."""
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    return ((torch.arange(1, tokens + 1, device=device) * 7919 + 104729 * shift) % vocabulary)[None]


def _logits(model: PreTrainedModel, ids: torch.Tensor, row: Spans, parents: Sequence[int] | None) -> torch.Tensor:
    positions = torch.tensor([positions_of(row.lengths, parents)], device=ids.device)
    # Not under no_grad: there a quantised layer may repack its weights (in 4 bits, on some CPUs), and spoil them.
    with torch.enable_grad(), segments(model, row.lengths, parents):
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
