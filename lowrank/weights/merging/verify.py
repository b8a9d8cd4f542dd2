"""Whether a merged model answers as base and adapter do: logits and greedy choices, compared on a few prompts.

Prompts and answers to them are given as one pack, so that each model runs once. In a model whose state crosses the
borders of a pack, it crosses them alike before and after.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from lowrank.adapters import disabled
from lowrank.errors import InputError
from lowrank.quantisers.registry import loading_config, quantiser_of, settle
from lowrank.weights.files.adapter_file import QUANTISED_FROM, AdapterFile
from lowrank.weights.files.model_folder import ModelFolder
from lowrank.weights.files.saving import load

PROMPTS = (
    ("The capital of France is", " Paris, on the Seine."),
    ("Write one sentence about the sea.", "The sea keeps no footprints, but it remembers every shore."),
    ("def fibonacci(n):", "\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n"),
    ("Q: What is 17 + 25?\nA:", " 42"),
)
_RANDOM = 32  # tokens of each prompt where there is no tokenizer


@dataclass(frozen=True, slots=True)
class Verification:
    """How near the merged model is to base and adapter.

    Attributes:
        prompts: How many prompts, with an answer to each.
        tokens: How many positions were compared.
        same_greedy: The share of positions at which both choose the same token.
        logit_error: Norm of the difference of the logits, as a share of the norm of the adapter's effect on them.
        largest: The largest difference of one logit.
    """

    prompts: int
    tokens: int
    same_greedy: float
    logit_error: float
    largest: float

    @property
    def failed(self) -> bool:
        """Whether the merged model is farther from base and adapter than the base alone is: then the merge is wrong."""
        return not self.logit_error < 1.0


def check_verify(how: object) -> None:
    """InputError when there is no such way to verify."""
    if how not in (True, False, "answers"):
        raise InputError(f'there is no verification {how!r}; there are True, False and "answers"')


def verify_merge(
    base: ModelFolder,
    adapter: AdapterFile,
    merged: Path,
    quantization: dict[str, Any] | None,
    prompts: Sequence[tuple[str, str]] = PROMPTS,
) -> Verification:
    """Compares on prompts with answers, each model in one pass over all of them.

    One model is in memory at a time, in float32, so that the difference is the merge's and not the arithmetic's.

    Args:
        base: The base.
        adapter: The adapter.
        merged: The merged folder.
        quantization: How the base is quantised while the adapter acts (a quantiser's options), None for not.
        prompts: Texts and answers; the tokenizer's chat template is put around them where it has one.

    Raises:
        InputError: The model is no causal language model.
    """
    refuse_unanswering(base)
    pack = _pack(merged, base, prompts)
    model: Any = load(_in_size(_model(base.folder, base, quantization), base), adapter.path)
    wanted = _logits(model, pack)
    with disabled(model):
        without = _logits(model, pack)
    del model
    gc.collect()
    got = _logits(_model(merged, base, None), pack)
    width = min(wanted.shape[-1], without.shape[-1])
    effect, error = _norm(wanted[:, :width] - without[:, :width]), _norm(got - wanted)
    return Verification(
        prompts=len(pack),
        tokens=len(got),
        same_greedy=(got.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        logit_error=error / effect if effect else float(error > 1e-3),
        largest=(got - wanted).abs().max().item(),
    )


def refuse_unanswering(base: ModelFolder) -> None:
    """InputError for a model that does not generate text from text alone."""
    if not base.skeleton.can_generate() or base.config.is_encoder_decoder:
        raise InputError(
            f"only causal language models answer prompts, and this is a {type(base.skeleton).__name__}",
            fix="Merge without comparing answers (--verify tensors): each tensor is tried all the same.",
        )


def _model(folder: Path, base: ModelFolder, quantization: dict[str, Any] | None) -> PreTrainedModel:
    """In float32, where it is quantised from the dtype that it was quantised from in training."""
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
    if quantization:
        noted = quantization.get(QUANTISED_FROM)
        options["dtype"] = getattr(torch, noted) if noted else "auto"
        options["quantization_config"] = loading_config(quantization)
    model = type(base.skeleton).from_pretrained(folder, **options)
    settle(model)
    for module in model.modules():
        _widen(module)
    return model.eval()


def _widen(module: nn.Module) -> None:
    """To float32, aside of a weight that is quantised."""
    quantiser = quantiser_of(module)
    if quantiser is not None:
        quantiser.widen(module)
    for name, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is not None and tensor.is_floating_point() and not (quantiser is not None and name == "weight"):
            tensor.data = tensor.data.float()


def _in_size(model: PreTrainedModel, base: ModelFolder) -> PreTrainedModel:
    """With as many tokens as the adapter was trained with."""
    if base.sizes.vocabulary is not None:
        model.resize_token_embeddings(base.sizes.vocabulary)
    return model


def _pack(folder: Path, base: ModelFolder, prompts: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The tokens of each prompt and its answer, shortened to what the model has positions for all together."""
    text = base.config.get_text_config()
    most = (getattr(text, "max_position_embeddings", None) or 4096) // len(prompts)
    if not (folder / "tokenizer_config.json").is_file():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(text.vocab_size, (len(prompts), min(most, _RANDOM)), generator=generator).tolist()
    try:
        return [ids[:most] for ids in _tokens(folder, prompts)]
    except Exception as error:  # tokenizers and templates raise whatever they like
        raise InputError(
            f"the prompts cannot be tokenised: {type(error).__name__}: {error}",
            where=str(base.folder),
            fix="Mend the tokenizer or its chat template, or merge without comparing answers (--verify tensors).",
        ) from error


def _tokens(folder: Path, prompts: Sequence[tuple[str, str]]) -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        return [tokenizer(prompt + answer).input_ids for prompt, answer in prompts]
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in prompts
    ]
    return [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]


@torch.no_grad()
def _logits(model: Any, pack: list[list[int]]) -> torch.Tensor:
    """(tokens, vocabulary), one pass over all prompts."""
    ids = torch.tensor([[token for tokens in pack for token in tokens]])
    positions = torch.tensor([[place for tokens in pack for place in range(len(tokens))]])
    takes = inspect.signature(type(model).forward).parameters
    more = {"position_ids": positions, "use_cache": False}
    return model(input_ids=ids, **{name: value for name, value in more.items() if name in takes}).logits[0].float()


def _norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
