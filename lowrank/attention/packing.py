"""Packs: telling the backends where segments end, and proving before a run that segments do not see one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from lowrank.attention.flash import packing_arguments
from lowrank.attention.segments import ANNOUNCED
from lowrank.errors import InputError


@contextmanager
def segments(model: PreTrainedModel, lengths: Sequence[int] | None) -> Iterator[None]:
    """Announce the segments of one pack, to be held over its forward *and* backward pass.

    The pack is one row of `sum(lengths)` tokens whose position_ids restart at each segment, given to the model with
    `attention_mask=None` and `use_cache=False`. `eager` and `sdpa` need no more than that; the announcement spares the
    others looking for the borders.

    Args:
        model: The model, its attention set by `set_attention`.
        lengths: Tokens of each segment, in order; None (a padded batch): announces nothing.
    """
    if lengths is None:
        yield
        return
    hook = None
    if is_flash_attention_requested(model.config):
        device = next(model.parameters()).device
        hook = model.register_forward_pre_hook(_adding(packing_arguments(lengths, device)), with_kwargs=True)
    keys = {id(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    ANNOUNCED.update(dict.fromkeys(keys, tuple(lengths)))
    try:
        yield
    finally:
        for key in keys:
            del ANNOUNCED[key]
        if hook is not None:
            hook.remove()


def announced_segments(model: PreTrainedModel) -> tuple[int, ...] | None:
    """The lengths that `segments` has announced for the pack under way; None outside of one."""
    return ANNOUNCED.get(id(model.config))


def _adding(more: dict[str, torch.Tensor | int]) -> Callable[..., tuple[tuple[object, ...], dict[str, object]]]:
    return lambda module, args, kwargs: (args, {**kwargs, **more})


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
