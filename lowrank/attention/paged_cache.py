"""How large the cache of paged answering is: room for the prompts that are answered at a time, and no more.

Left to itself transformers takes 90 % of a card's free memory, as a server would, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel

from lowrank.attention.setting import setting_of
from lowrank.errors import JobError

PAGE = 256  # tokens of one page of the cache, transformers' default
AT_ONCE_ON_CPU = 16  # on CPU every prompt of a step attends over all pages of the step: more at once costs more
TOKENS_A_STEP_ON_CPU = 128
_TOKENS_A_STEP = 8192  # transformers' default
_SHARE = 0.8  # of a card's free memory for pages; a step's activations and logits take of the rest


def cache_for(
    lengths: Sequence[int], max_new_tokens: int, at_once: int, fitting: int | None = None
) -> ContinuousBatchingConfig:
    """Room for the longest prompts at once, each with the longest answer; the others wait for pages that become free.

    Args:
        lengths: Tokens of each prompt.
        max_new_tokens: The longest answer.
        at_once: How many prompts are answered at a time; on a CPU AT_ONCE_ON_CPU at most.
        fitting: For how many pages a card has memory (`pages_that_fit`); None on a CPU.

    Raises:
        JobError: a card has no memory for one prompt.
    """
    count = min(at_once, len(lengths), AT_ONCE_ON_CPU if fitting is None else len(lengths))
    together = sorted(lengths, reverse=True)[:count]
    pages = [-(-(length + max_new_tokens) // PAGE) for length in together]
    needed, tokens = sum(pages) + 1, TOKENS_A_STEP_ON_CPU
    if fitting is not None:
        if fitting <= pages[0]:
            raise JobError(
                f"out of memory: {together[0]:,} tokens and an answer of {max_new_tokens:,} take {pages[0] + 1} pages "
                f"of {PAGE} keys and values, and the card has room for {fitting}",
                fix="Set training.generation_max_new_tokens lower, or leave long rows out of the evaluation.",
            )
        needed, tokens = min(needed, fitting), min(_TOKENS_A_STEP, max(sum(together), count))
    return ContinuousBatchingConfig(
        num_blocks=needed,
        max_batch_tokens=tokens,
        max_requests_per_batch=None if fitting is None else count,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )


def pages_that_fit(model: PreTrainedModel) -> int | None:
    """How many pages, each of all layers' keys and values, a card has memory for; None on a CPU."""
    setting, config = setting_of(model, packing=False), model.config.get_text_config()
    if setting.device.type == "cpu" or setting.head_dim is None:
        return None
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    # Of each token two vectors a head in every layer; in the layer at work they are read once more, at most repeated.
    vectors = 2 * kept * config.num_hidden_layers + 2 * heads + kept
    free = torch.cuda.mem_get_info(setting.device)[0]
    spare = torch.cuda.memory_reserved(setting.device) - torch.cuda.memory_allocated(setting.device)
    return int(_SHARE * (free + spare)) // (PAGE * vectors * setting.head_dim * setting.dtype.itemsize)
