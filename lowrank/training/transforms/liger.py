"""Liger's Triton kernels for norms and gated activations, on CUDA, where they say what the model says.

Its functions also replace classes and functions of the model's file in transformers, for every model that this process
loads. Those are put back: the kernels stay on the one model that asked for them. Rotary positions, which can only be
replaced in that way, are left as they are, and so are the head and the loss, which `training.loss` takes care of.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from lowrank.errors import InputError

WHERE = "training.use_liger_kernel"
_WANTED = frozenset({"rms_norm", "layer_norm", "swiglu", "geglu"})
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest hidden state


def use_liger(model: Any) -> list[str]:
    """Puts the kernels in, for this model alone.

    Args:
        model: A transformers model on a CUDA device, with or without adapters.

    Returns:
        What Liger has for this kind of model: some of rms_norm, layer_norm, swiglu, geglu.

    Raises:
        InputError: Liger is not installed, has nothing for this model, does not run on its device, or its kernels give
            other hidden states than the model did.
    """
    if find_spec("liger_kernel") is None:
        raise InputError(
            "liger-kernel is not installed",
            where=WHERE,
            fix="Install it (`pip install 'lowrank[liger]'`), or set it false.",
        )
    if model.device.type != "cuda":
        raise InputError(f"Liger's kernels run on CUDA, and the model is on {model.device}", where=WHERE)
    before = _hidden_states(model)
    replaced = _replace_by_kernels(model)
    after = _hidden_states(model)
    error, largest = float((after - before).abs().max()), float(before.abs().max())
    if not error <= _TOLERANCE.get(model.dtype, 1e-4) * largest:
        raise InputError(
            f"Liger's kernels change the hidden states of {type(model).__name__} by {error / largest:.1%}",
            where=WHERE,
            fix="Set it false.",
        )
    return replaced


def _replace_by_kernels(model: Any) -> list[str]:
    """The same without the proof, on any device that Triton runs on."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    known = {} if apply is None else dict(inspect.signature(apply).parameters)
    wanted = sorted(_WANTED & set(known))
    if apply is None or not wanted:
        raise InputError(f"Liger has no kernels for {type(model).__name__}", where=WHERE, fix="Set it false.")
    with _put_back(sys.modules[type(model).__module__]):
        apply(**{name: name in wanted for name in known if name != "model"}, model=model)
    return wanted


@contextmanager
def _put_back(module: Any) -> Iterator[None]:
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


@torch.no_grad()
def _hidden_states(model: Any) -> torch.Tensor:
    """Of a few tokens, the same at every call: (1, 8, hidden) float32."""
    embedding = model.get_input_embeddings()
    ids = (torch.arange(1, 9, device=embedding.weight.device) * 7919 % embedding.weight.shape[0])[None]
    was_training = model.training
    model.eval()
    try:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
    finally:
        model.train(was_training)
