"""Whether a merged model answers as base and adapter do: logits and greedy answers, compared on a few prompts."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lowrank.adapters import disabled
from lowrank.errors import InputError
from lowrank.weights.adapterfile import AdapterFile
from lowrank.weights.basemodel import BaseModel
from lowrank.weights.saving import load

PROMPTS = (
    "The capital of France is",
    "Write one sentence about the sea.",
    "def fibonacci(n):",
    "Q: What is 17 + 25?\nA:",
)
_NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Verification:
    """How near the merged model is to base and adapter.

    Attributes:
        tokens: How many positions were compared.
        same_greedy: The share of positions at which both choose the same token.
        logit_error: Norm of the difference of the logits, as a share of the norm of the adapter's effect on them.
        largest: The largest difference of one logit.
    """

    tokens: int
    same_greedy: float
    logit_error: float
    largest: float

    @property
    def failed(self) -> bool:
        """Whether the merged model is farther from base and adapter than the base alone is: then the merge is wrong."""
        return not self.logit_error < 1.0


def fits_in_memory(base: BaseModel) -> bool:
    """Whether the model, in float32 beside its files' dtype, takes less than half of the memory that is free."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cached = _available()
    except (ValueError, OSError):
        return False
    return 3 * base.size < max(free, cached) / 2


def verify_merge(
    base: BaseModel,
    adapter: AdapterFile,
    merged: Path,
    quantization: dict[str, Any] | None,
    prompts: Sequence[str] = PROMPTS,
) -> Verification:
    """Compares on prompts, with the greedy answers that base and adapter give to them.

    One model is in memory at a time, in float32, so that the difference is the merge's and not the arithmetic's.

    Args:
        base: The base.
        adapter: The adapter.
        merged: The merged folder.
        quantization: How the base is quantised while the adapter acts (BitsAndBytesConfig's fields), None for not.
        prompts: Texts; the tokenizer's chat template is put around them where it has one.

    Raises:
        InputError: The model is no causal language model.
    """
    if not can_verify(base):
        raise InputError(f"Only causal language models can be verified, not a {type(base.skeleton).__name__}.")
    inputs = _inputs(merged, base, prompts)
    model: Any = load(_model(base.folder, base, quantization), adapter.path)
    with torch.no_grad():
        answers = [_greedy(model, ids) for ids in inputs]
        wanted = [model(ids).logits.float() for ids in answers]
        with disabled(model):
            without = [model(ids).logits.float() for ids in answers]
    del model
    gc.collect()
    model = _model(merged, base, None)
    with torch.no_grad():
        got = [model(ids).logits.float() for ids in answers]
    width = min(wanted[0].shape[-1], without[0].shape[-1])
    differences = [a - b for a, b in zip(got, wanted, strict=True)]
    effects = [a[..., :width] - b[..., :width] for a, b in zip(wanted, without, strict=True)]
    agree = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(got, wanted, strict=True)])
    effect, error = _norm(effects), _norm(differences)
    return Verification(
        tokens=agree.numel(),
        same_greedy=agree.float().mean().item(),
        logit_error=error / effect if effect else float(error > 1e-3),
        largest=max(difference.abs().max().item() for difference in differences),
    )


def can_verify(base: BaseModel) -> bool:
    """Whether the model generates text from text alone."""
    return base.skeleton.can_generate() and not base.config.is_encoder_decoder


def _model(folder: Path, base: BaseModel, quantization: dict[str, Any] | None) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig.from_dict(quantization)
    model = type(base.skeleton).from_pretrained(folder, **options)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):  # the first pass would repack the weights and spoil them
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _inputs(folder: Path, base: BaseModel, prompts: Sequence[str]) -> list[Tensor]:
    if not (folder / "tokenizer_config.json").is_file():
        generator = torch.Generator().manual_seed(0)
        vocabulary = base.config.get_text_config().vocab_size
        return [torch.randint(vocabulary, (1, 16), generator=generator) for _ in prompts]
    try:
        return [torch.tensor([ids]) for ids in _tokens(folder, prompts)]
    except Exception as error:  # tokenizers and templates raise whatever they like
        raise InputError(
            f"The prompts cannot be tokenised: {type(error).__name__}: {error}",
            where=str(base.folder),
            fix="Mend the tokenizer or its chat template, or merge without comparing (--no-verify, verify=False).",
        ) from error


def _tokens(folder: Path, prompts: Sequence[str]) -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        return [tokenizer(prompt).input_ids for prompt in prompts]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    made = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True) for chat in chats]
    return [ids["input_ids"] for ids in made]


def _greedy(model: Any, ids: Tensor) -> Tensor:
    settings = transformers.GenerationConfig(max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0)
    return model.generate(ids, generation_config=settings, attention_mask=torch.ones_like(ids))


def _norm(tensors: list[Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


def _available() -> int:
    """Linux's estimate, which counts caches that can be given up."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
