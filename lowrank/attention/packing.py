"""Packs and padded rows: telling the backends where segments end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from lowrank.attention import packed_positions
from lowrank.attention.announced import ANNOUNCED, SHARING, Announced, share_masks
from lowrank.attention.announced_rows import ROWS, AnnouncedRows, PaddedRows
from lowrank.attention.flash import flash_attention, packing_arguments
from lowrank.attention.forest import starts_of
from lowrank.attention.segmentwise import IMPLEMENTATION
from lowrank.attention.spans import from_lengths
from lowrank.errors import InputError

Hook = Callable[[object, tuple[object, ...], dict[str, object]], tuple[Any, Any] | None]


@contextmanager
def segments(
    model: PreTrainedModel,
    lengths: Sequence[int] | None,
    parents: Sequence[int] | None = None,
    padded: PaddedRows | None = None,
) -> Iterator[None]:
    """Announce one pack's segments or a padded batch's rows, to be held over its forward *and* backward pass.

    The pack is one row of `sum(lengths)` tokens whose position_ids restart at each segment, given to the model with
    `attention_mask=None` and `use_cache=False`. `eager` and `sdpa` need no more than that; the announcement spares the
    others looking for the borders. Calls with other tokens meanwhile are not touched.

    Segments with parents are parts of examples that begin alike: a segment's tokens see all of its ancestors' and
    position_ids go on from its parent's (`positions_of`). Its logits are those of the tokens at the end of the example
    that its ancestors and it make up; run `check_sharing` before the first.

    Padded rows mean the same whether they are announced or not; a card is then not asked where they end.

    Args:
        model: The model, its attention set by `set_attention`.
        lengths: Tokens of each segment, in order; None: it is no pack.
        parents: For each segment the number of the one that it goes on from, which must come earlier in the pack; -1:
            none. None: -1 for all.
        padded: The rows of a batch that is no pack; None: announces nothing of them.

    Raises:
        InputError: `parents` name no earlier segments, or the model's attention cannot share beginnings. On the model's
            call: it is given the pack's tokens with an attention_mask or a cache, under which transformers looks for no
            segments; or, with parents, without position_ids, or it makes a mask of its own.
    """
    keys = {id(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    with ExitStack() as end:
        if lengths is not None:
            _announce_pack(model, Announced(tuple(lengths), _parents(model, lengths, parents)), keys, end)
        elif padded is not None:
            _announce(ROWS, keys, told := AnnouncedRows(model, padded), end)
            end.callback(model.register_forward_pre_hook(_for_rows(model, told), with_kwargs=True).remove)
        yield


def _announce_pack(model: PreTrainedModel, told: Announced, keys: set[int], end: ExitStack) -> None:
    end.callback(model.register_forward_pre_hook(_for_a_pack(model, told, end), with_kwargs=True).remove)
    if told.parents is not None:
        end.callback(model.register_forward_hook(_after_a_forest(told)).remove)
    _announce(ANNOUNCED, keys, told, end)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # some ask the card in each pass whether a token looks like padding
            module.warn_if_padding_and_no_attention_mask = _warn_of_none
            end.callback(delattr, module, "warn_if_padding_and_no_attention_mask")


def _warn_of_none(input_ids: object, attention_mask: object) -> None:
    """A pack has no padding."""


def _announce(table: dict[int, Any], keys: set[int], told: object, end: ExitStack) -> None:
    for key in keys:
        table[key] = told
        end.callback(table.pop, key)


def _for_rows(model: PreTrainedModel, told: AnnouncedRows) -> Hook:
    """Before the model's call: whether it is given the rows' mask, and not another."""
    names = _arguments(model)

    def before(module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        asked = {**dict(zip(names, args, strict=False)), **kwargs}
        told.called = asked.get("attention_mask") is told.rows.mask

    return before


def _arguments(model: PreTrainedModel) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _parents(model: PreTrainedModel, lengths: Sequence[int], parents: Sequence[int] | None) -> tuple[int, ...] | None:
    """The parents, if any segment has one and the model's attention can share beginnings."""
    starts_of(lengths, parents)
    if parents is None or max(parents) < 0:
        return None
    share_masks()
    name = model.config._attn_implementation
    if name not in (*SHARING, IMPLEMENTATION) and AttentionInterface().get(name) is not flash_attention:
        raise cannot_share(model, "it knows no segments with parents", fix="Use `attention: segments`.")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _KINDS
    if kinds:
        raise cannot_share(model, f"it has layers of the kind {', '.join(sorted(kinds))}")
    return tuple(parents)


# Kinds of layers whose masks, which `announced` makes, say all that a token sees.
_KINDS = {"full_attention", "sliding_attention"}


def _for_a_pack(model: PreTrainedModel, told: Announced, end: ExitStack) -> Hook:
    """Before the model's call with the pack's tokens: refuses what makes segments see one another, adds the borders."""
    names = _arguments(model)
    restart = _restart(told) or model.config._attn_implementation == IMPLEMENTATION
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
        positions = asked.get("position_ids")
        if restart and isinstance(positions, torch.Tensor):
            packed_positions.announce(positions)
            end.callback(packed_positions.forget, positions)
        return args, {**kwargs, **more}

    return before


def _restart(told: Announced) -> bool:
    """Whether a segment begins elsewhere than at the position after the last of the one before it in the row."""
    starts = starts_of(told.lengths, told.parents)
    ends = [start + length for start, length in zip(starts, told.lengths, strict=True)]
    return any(start != end for start, end in zip(starts[1:], ends[:-1], strict=True))


def _after_a_forest(told: Announced) -> Callable[[PreTrainedModel, object, object], None]:
    """After the model's call: refuses what has made no mask of the pack, since its tokens cannot have obeyed one."""

    def after(model: PreTrainedModel, args: object, out: object) -> None:
        if told.called and not told.asked:
            raise cannot_share(model, "it makes its masks itself, or needs none")

    return after


def cannot_share(model: PreTrainedModel, what: str, fix: str = "Give each example a segment of its own.") -> InputError:
    """What a person is told whose model cannot share the beginnings of examples."""
    name, implementation = type(model).__name__, model.config._attn_implementation
    return InputError(
        f"{name} with attention `{implementation}` cannot share the beginnings of examples: {what}", fix=fix
    )
