"""Packs: telling the backends where segments end, and proving before a run that segments do not see one another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from lowrank.attention.announced import ANNOUNCED, SHARING, Announced, share_masks
from lowrank.attention.flash import flash_attention, packing_arguments
from lowrank.attention.forest import positions_of, starts_of
from lowrank.attention.segmentwise import IMPLEMENTATION
from lowrank.attention.spans import from_lengths
from lowrank.errors import InputError

Hook = Callable[[object, tuple[object, ...], dict[str, object]], tuple[Any, Any] | None]


@contextmanager
def segments(
    model: PreTrainedModel, lengths: Sequence[int] | None, parents: Sequence[int] | None = None
) -> Iterator[None]:
    """Announce the segments of one pack, to be held over its forward *and* backward pass.

    The pack is one row of `sum(lengths)` tokens whose position_ids restart at each segment, given to the model with
    `attention_mask=None` and `use_cache=False`. `eager` and `sdpa` need no more than that; the announcement spares the
    others looking for the borders. Calls with other tokens meanwhile are not touched.

    Segments with parents are parts of examples that begin alike: a segment's tokens see all of its ancestors' and
    position_ids go on from its parent's (`positions_of`). Its logits are those of the tokens at the end of the example
    that its ancestors and it make up; run `check_sharing` before the first.

    Args:
        model: The model, its attention set by `set_attention`.
        lengths: Tokens of each segment, in order; None (a padded batch): announces nothing.
        parents: For each segment the number of the one that it goes on from, which must come earlier in the pack; -1:
            none. None: -1 for all.

    Raises:
        InputError: `parents` name no earlier segments, or the model's attention cannot share beginnings. On the model's
            call: it is given the pack's tokens with an attention_mask or a cache, under which transformers looks for no
            segments; or, with parents, without position_ids, or it makes a mask of its own.
    """
    if lengths is None:
        yield
        return
    told = Announced(tuple(lengths), _parents(model, lengths, parents))
    hooks = [model.register_forward_pre_hook(_for_a_pack(model, told), with_kwargs=True)]
    if told.parents is not None:
        hooks.append(model.register_forward_hook(_after_a_forest(told)))
    keys = {id(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    ANNOUNCED.update(dict.fromkeys(keys, told))
    try:
        yield
    finally:
        for key in keys:
            del ANNOUNCED[key]
        for hook in hooks:
            hook.remove()


def _parents(model: PreTrainedModel, lengths: Sequence[int], parents: Sequence[int] | None) -> tuple[int, ...] | None:
    """The parents, if any segment has one and the model's attention can share beginnings."""
    starts_of(lengths, parents)
    if parents is None or max(parents) < 0:
        return None
    share_masks()
    name = model.config._attn_implementation
    if name not in (*SHARING, IMPLEMENTATION) and AttentionInterface().get(name) is not flash_attention:
        raise _cannot_share(model, "it knows no segments with parents", fix="Use `attention: segments`.")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _KINDS
    if kinds:
        raise _cannot_share(model, f"it has layers of the kind {', '.join(sorted(kinds))}")
    return tuple(parents)


# Kinds of layers whose masks, which `announced` makes, say all that a token sees.
_KINDS = {"full_attention", "sliding_attention"}


def _for_a_pack(model: PreTrainedModel, told: Announced) -> Hook:
    """Before the model's call with the pack's tokens: refuses what makes segments see one another, adds the borders."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    cached = getattr(model.config.get_text_config(), "use_cache", False)
    more = {}
    if is_flash_attention_requested(model.config):
        spans = from_lengths(told.lengths, None, told.parents)
        more = packing_arguments(spans, next(model.parameters()).device)

    def before(module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Any, Any] | None:
        asked = {**dict(zip(names, args, strict=False)), **kwargs}
        row = next((asked[name] for name in ("input_ids", "inputs_embeds") if asked.get(name) is not None), None)
        told.called = isinstance(row, torch.Tensor) and row.shape[:2] == (1, sum(told.lengths))
        if not told.called:
            return None
        caches = asked.get("use_cache")
        if asked.get("attention_mask") is not None or (cached if caches is None else caches):
            raise InputError(
                "the segments of a pack would see one another under an attention_mask or a cache",
                fix="Call the model with attention_mask=None, use_cache=False and position_ids that restart.",
            )
        if told.parents is not None and asked.get("position_ids") is None:
            raise InputError(
                "without position_ids the segments of a pack would not go on from their parents' positions",
                fix="Give the model the position_ids that `positions_of` says.",
            )
        return args, {**kwargs, **more}

    return before


def _after_a_forest(told: Announced) -> Callable[[PreTrainedModel, object, object], None]:
    """After the model's call: refuses what has made no mask of the pack, since its tokens cannot have obeyed one."""

    def after(model: PreTrainedModel, args: object, out: object) -> None:
        if told.called and not told.asked:
            raise _cannot_share(model, "it makes its masks itself, or needs none")

    return after


def _cannot_share(
    model: PreTrainedModel, what: str, fix: str = "Give each example a segment of its own."
) -> InputError:
    name, implementation = type(model).__name__, model.config._attn_implementation
    return InputError(
        f"{name} with attention `{implementation}` cannot share the beginnings of examples: {what}", fix=fix
    )


# Two segments; what the first says must not change the second.
_LENGTHS = (7, 5)
# A beginning, two ends of it, and an end of the first of them that does not stand beside it.
_TREE, _PARENTS = (7, 5, 6, 4), (-1, 0, 0, 1)
# Norm of a difference of logits, as a share of the logits' norm. Packed and apart take matrices of other shapes, hence
# other roundings; two packs of one shape hardly differ unless one segment sees the other.
_APART = {torch.float32: 1e-4, torch.float64: 1e-4}
_APART_16_BITS = 3e-2
_UNSEEN = {torch.float32: 1e-5, torch.float64: 1e-5}
_UNSEEN_16_BITS = 2e-3


def check_packing(model: PreTrainedModel) -> None:
    """Prove on two short segments that the model, as it is configured, can train on packs.

    The second segment's logits must not change with the tokens of the first, and both segments' logits must be what
    they are for each of them alone.

    Raises:
        InputError: They are not: in this architecture the segments of a pack see one another, or lose their positions.
    """
    ids = _ids(model, sum(_LENGTHS), 0)
    with _evaluating(model):
        found = _logits(model, ids, _LENGTHS)
        apart = torch.cat([_logits(model, row, (row.shape[1],)) for row in ids.split(_LENGTHS, dim=1)], dim=1)
        seen = _influence(model, found, _LENGTHS, None, 0)
    if not seen <= _UNSEEN.get(model.dtype, _UNSEEN_16_BITS):
        raise _cannot_pack(model, f"one example changes the logits of the next by {seen:.1e} of their size")
    if not (difference := _share(found, apart)) <= _APART.get(model.dtype, _APART_16_BITS):
        raise _cannot_pack(model, f"packed, the logits differ by {difference:.1e} of their size from those apart")


def check_sharing(model: PreTrainedModel) -> None:
    """Prove on a short tree that the model, as it is configured, can compute what examples begin with once for all.

    No segment's logits must change with the tokens of one that is not its ancestor, and each path's logits must be
    what they are for it alone.

    Raises:
        InputError: They are not, or the model's attention takes no segments with parents.
    """
    ids = _ids(model, sum(_TREE), 0)
    with _evaluating(model):
        found = _logits(model, ids, _TREE, _PARENTS)
        seen = max(_influence(model, found, _TREE, _PARENTS, changed) for changed in range(len(_TREE)))
        parts, logits, apart = ids.split(_TREE, dim=1), found.split(_TREE, dim=1), []
        for path in ((0, 1, 3), (0, 2)):
            # Without position_ids: a model that counts from elsewhere than 0 does so here.
            row = torch.cat([parts[number] for number in path], dim=1)
            alone = model(input_ids=row, use_cache=False).logits.detach().float()
            apart.append(_share(torch.cat([logits[number] for number in path], dim=1), alone))
    if not seen <= _UNSEEN.get(model.dtype, _UNSEEN_16_BITS):
        raise _cannot_share(model, f"one example changes the logits of another by {seen:.1e} of their size")
    if not max(apart) <= _APART.get(model.dtype, _APART_16_BITS):
        raise _cannot_share(model, f"shared, the logits differ by {max(apart):.1e} of their size from those apart")


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


def _influence(
    model: PreTrainedModel,
    before: torch.Tensor,
    lengths: Sequence[int],
    parents: Sequence[int] | None,
    changed: int,
) -> float:
    """How much the logits of the segments that do not go on from one change with its tokens."""
    row = from_lengths(lengths, None, parents)
    others = [n for n in range(len(lengths)) if n != changed and changed not in row.path(n)]
    if not others:
        return 0.0
    start, end = row.spans[changed]
    ids = _ids(model, row.length, 0)
    ids[:, start:end] = _ids(model, row.length, 1)[:, start:end]
    after = _logits(model, ids, lengths, parents)
    first, second = (torch.cat([x.split(list(lengths), 1)[n] for n in others], 1) for x in (before, after))
    return _share(second, first)


def _share(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _ids(model: PreTrainedModel, tokens: int, shift: int) -> torch.Tensor:
    """(1, tokens) ids spread over the vocabulary, the same at every run and without a change of the random state."""
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    return ((torch.arange(1, tokens + 1, device=device) * 7919 + 104729 * shift) % vocabulary)[None]


def _logits(
    model: PreTrainedModel, ids: torch.Tensor, lengths: Sequence[int], parents: Sequence[int] | None = None
) -> torch.Tensor:
    positions = torch.tensor([positions_of(lengths, parents)], device=ids.device)
    # Not under no_grad: there a quantised layer may repack its weights (in 4 bits, on some CPUs), and spoil them.
    with torch.enable_grad(), segments(model, lengths, parents):
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.detach().float()
