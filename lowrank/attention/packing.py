"""Packs: telling the backends where segments end, and proving before a run that segments do not see one another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from lowrank.attention.flash import packing_arguments
from lowrank.attention.segments import ANNOUNCED
from lowrank.errors import InputError

Hook = Callable[[object, tuple[object, ...], dict[str, object]], tuple[Any, Any] | None]


@contextmanager
def segments(model: PreTrainedModel, lengths: Sequence[int] | None) -> Iterator[None]:
    """Announce the segments of one pack, to be held over its forward *and* backward pass.

    The pack is one row of `sum(lengths)` tokens whose position_ids restart at each segment, given to the model with
    `attention_mask=None` and `use_cache=False`. `eager` and `sdpa` need no more than that; the announcement spares the
    others looking for the borders. Calls with other tokens meanwhile are not touched.

    Args:
        model: The model, its attention set by `set_attention`.
        lengths: Tokens of each segment, in order; None (a padded batch): announces nothing.

    Raises:
        InputError: On the model's call: it is given the pack's tokens with an attention_mask or a cache, under which
            transformers looks for no segments.
    """
    if lengths is None:
        yield
        return
    hook = model.register_forward_pre_hook(_for_a_pack(model, lengths), with_kwargs=True)
    keys = {id(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    ANNOUNCED.update(dict.fromkeys(keys, tuple(lengths)))
    try:
        yield
    finally:
        for key in keys:
            del ANNOUNCED[key]
        hook.remove()


def announced_segments(model: PreTrainedModel) -> tuple[int, ...] | None:
    """The lengths that `segments` has announced for the pack under way; None outside of one."""
    return ANNOUNCED.get(id(model.config))


def _for_a_pack(model: PreTrainedModel, lengths: Sequence[int]) -> Hook:
    """Before the model's call with the pack's tokens: refuses what makes segments see one another, adds the borders."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    cached, tokens = getattr(model.config.get_text_config(), "use_cache", False), sum(lengths)
    more = {}
    if is_flash_attention_requested(model.config):
        more = packing_arguments(lengths, next(model.parameters()).device)

    def before(module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Any, Any] | None:
        asked = {**dict(zip(names, args, strict=False)), **kwargs}
        row = next((asked[name] for name in ("input_ids", "inputs_embeds") if asked.get(name) is not None), None)
        if not isinstance(row, torch.Tensor) or row.shape[:2] != (1, tokens):
            return None
        caches = asked.get("use_cache")
        if asked.get("attention_mask") is not None or (cached if caches is None else caches):
            raise InputError(
                "the segments of a pack would see one another under an attention_mask or a cache",
                fix="call the model with attention_mask=None, use_cache=False and position_ids that restart",
            )
        return args, {**kwargs, **more}

    return before


# Two segments; what the first says must not change the second.
_LENGTHS = (7, 5)
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
    was_training = model.training
    model.eval()
    try:
        seen, apart = _influence(model), _difference_to_apart(model)
    finally:
        model.train(was_training)
    if not seen <= _UNSEEN.get(model.dtype, _UNSEEN_16_BITS):
        raise _cannot_pack(model, f"one example changes the logits of the next by {seen:.1e} of their size")
    if not apart <= _APART.get(model.dtype, _APART_16_BITS):
        raise _cannot_pack(model, f"packed, the logits differ by {apart:.1e} of their size from those apart")


def _cannot_pack(model: PreTrainedModel, what: str) -> InputError:
    return InputError(
        f"{type(model).__name__} with attention `{model.config._attn_implementation}` cannot train on packs: {what}",
        fix="set `data.packing: false`, which pads each example to its own row",
    )


def _influence(model: PreTrainedModel) -> float:
    one, other = _ids(model, 0), _ids(model, 0)
    other[:, : _LENGTHS[0]] = _ids(model, 1)[:, : _LENGTHS[0]]
    first, second = (_logits(model, ids, _LENGTHS)[:, _LENGTHS[0] :] for ids in (one, other))
    return float((first - second).norm() / first.norm())


def _difference_to_apart(model: PreTrainedModel) -> float:
    ids = _ids(model, 0)
    apart = torch.cat([_logits(model, row, (row.shape[1],)) for row in ids.split(_LENGTHS, dim=1)], dim=1)
    return float((_logits(model, ids, _LENGTHS) - apart).norm() / apart.norm())


def _ids(model: PreTrainedModel, shift: int) -> torch.Tensor:
    """(1, n) ids spread over the vocabulary, the same at every run and without a change of the random state."""
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    return ((torch.arange(1, sum(_LENGTHS) + 1, device=device) * 7919 + 104729 * shift) % vocabulary)[None]


def _logits(model: PreTrainedModel, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None]
    # Not under no_grad: there bitsandbytes repacks 4-bit weights on some CPUs, and spoils them.
    with torch.enable_grad(), segments(model, lengths):
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.detach().float()
