"""The `paged` backend: many prompts answered at once over a paged key-value cache, transformers' continuous batching.

A prompt that is done makes room for the next at once, and no prompt is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

from transformers import GenerationConfig, PreTrainedModel

from lowrank.attention.backend import Backend
from lowrank.attention.flash import FLASH
from lowrank.attention.paged_cache import cache_for, pages_that_fit
from lowrank.attention.sdpa import SDPA
from lowrank.attention.setting import Setting, setting_of
from lowrank.errors import InputError, JobError

# Models on which `set_attention` was asked for this backend: by its transformers name alone nobody could tell.
CHOSEN: WeakSet[PreTrainedModel] = WeakSet()


def generate_paged(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig,
    at_once: int | None = None,
) -> list[list[int]]:
    """Continue each prompt, with the adapters that are active, and give back the new tokens, in the prompts' order.

    The model's attention is swapped for the time of the call.

    Args:
        model: A model that `set_attention(model, "paged")` would take.
        prompts: Ids of each prompt, without padding.
        generation: Its `max_new_tokens` bounds every answer; the end-of-sequence token is part of an answer.
        at_once: For how many prompts the cache has room; None for all, where the device has.

    Raises:
        InputError: The model cannot be served exactly, or `max_new_tokens` is missing.
        JobError: transformers gave up on a prompt, or the device has no memory for one.
    """
    if generation.max_new_tokens is None:
        raise InputError("paged generation needs `max_new_tokens`", fix="Set it in the generation config.")
    setting = setting_of(model, packing=False)
    refusal = _refusal(setting)
    if refusal is not None:
        raise InputError(f"the attention backend `paged` cannot serve {setting.architecture}: {refusal}")
    model.set_attn_implementation(_implementation(setting))
    try:
        lengths = [len(prompt) for prompt in prompts]
        sizes = cache_for(lengths, generation.max_new_tokens, at_once or len(prompts), pages_that_fit(model))
        outputs = model.generate_batch(  # pyrefly: ignore[not-callable]
            [list(prompt) for prompt in prompts],
            generation_config=generation,
            continuous_batching_config=sizes,
            warmup=setting.device.type == "cuda",
        )
    finally:
        model.set_attn_implementation(setting.current)
    # transformers logs what went wrong and leaves the prompt out.
    errors = [output.error for output in outputs.values() if output.error is not None]
    if errors or len(outputs) != len(prompts):
        raise JobError(
            f"paged generation answered {len(outputs) - len(errors)} of {len(prompts)} prompts: "
            f"{errors[0] if errors else 'see the log above'}"
        )
    return [list(output.generated_tokens) for output in outputs.values()]


def paged_is_faster(model: PreTrainedModel) -> bool:
    """Whether many prompts are to be answered paged: the user chose so by name, or it is the faster way.

    On CPU it is not: 16 prompts of 120 tokens, 48 new tokens each, SmolLM2-135M in bfloat16 on one core took 9.9 s
    padded and 14.9 s paged, since the paged step attends over the pages of all prompts at once. With FlashAttention,
    whose kernels read pages, it is what continuous batching was made for; no card has measured it here yet.
    """
    if model in CHOSEN:
        return True
    setting = setting_of(model, packing=False)
    return FLASH.refusal(setting) is None and _refusal(setting) is None


def _refusal(setting: Setting) -> str | None:
    if not setting.supports_paging:
        return "transformers cannot page the keys and values of this architecture"
    if setting.sinks and setting.packing:
        return "with attention sinks it generates only, and cannot train"
    return None if FLASH.refusal(setting) is None or setting.sinks else SDPA.refusal(setting)


def _implementation(setting: Setting) -> str:
    if FLASH.refusal(setting) is None:
        return FLASH.implementation(setting)
    return "paged|eager" if setting.sinks else SDPA.implementation(setting)


PAGED = Backend("paged", _refusal, _implementation, "answers many prompts at once, without padding")
