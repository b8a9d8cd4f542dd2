"""What a base is, read off its config alone: no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowrank.adapters import LoraConfig
from lowrank.adapters.targeting.targets import find_targets
from lowrank.adapters.targeting.uncalled import Calls
from lowrank.errors import InputError
from lowrank.models import auto_for, cannot_load, check_folder
from lowrank.tasks.kinds_of_task import TASK_KINDS

# Packs are looked into before each run; of these it is known that their positions do not restart in one.
_COUNT_ON = ("opt", "bloom", "falcon")
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Base:
    """A base's sizes.

    Attributes:
        name: As it was given.
        model_class: What would be loaded.
        parameters: All of them.
        linear: Those in the layers that "all-linear" means.
        per_rank: What one rank of an adapter on all of those holds: the sum of their widths, in and out.
        layers: Of the decoder.
        hidden: The width of its states.
        kept: Values that a layer keeps for the backward pass, for each token.
        positions: The most that it was trained for; None where nothing limits them.
        packs: Whether examples in one row can be kept apart.
        experts: In each of its mixtures; 0 without.
    """

    name: str
    model_class: str
    parameters: int
    linear: int
    per_rank: int
    layers: int
    hidden: int
    kept: int
    positions: int | None
    packs: bool = True
    experts: int = 0


def base_of(
    name_or_path: str, *, task: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Base:
    """The sizes of a base.

    Raises:
        InputError: there is none, or transformers has no such model for the task (None: the next token).
    """
    check_folder(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise cannot_load(name_or_path, error) from error
    if task is None:
        _refuse_other_tasks(name_or_path, config)
    return sizes(name_or_path, config, task=task, trust_remote_code=trust_remote_code)


def _refuse_other_tasks(name: str, config: PreTrainedConfig) -> None:
    classes = list(config.architectures or [])
    generates = not classes or any(one.endswith(_GENERATES) for one in classes)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    if config.is_encoder_decoder or not generates or not known:
        raise InputError(
            f"{name} is a {classes[0] if classes else type(config).__name__}, and a config trains causal language "
            "models only",
            fix="Take a base that writes text from left to right, or adapt this one from Python: lowrank.wrap.",
        )


def sizes(name: str, config: PreTrainedConfig, *, task: str | None = None, trust_remote_code: bool = False) -> Base:
    """The sizes of what a config describes; nothing is read for the name."""
    auto: Any = AutoModelForCausalLM
    if task is not None:
        auto = auto_for(config, TASK_KINDS[task].auto_class, task, name)
    with torch.device("meta"):
        model: Any = auto.from_config(config, trust_remote_code=trust_remote_code)
    text = model.config.get_text_config()
    targets: list[Any] = list(find_targets(model, LoraConfig(), Calls(model)).modules.values())
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, list) else inner
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return Base(
        name=name,
        model_class=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in targets),
        per_rank=sum(sum(module.weight.shape) for module in targets),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        kept=4 * inner + 9 * text.hidden_size,  # counted on SmolLM2: 10,781 of 4 x 1,536 + 9 x 576 = 11,328
        positions=getattr(text, "max_position_embeddings", None),
        packs=text.model_type not in _COUNT_ON and not _mixes(model),
        experts=next((n for key in experts if isinstance(n := getattr(text, key, None), int) and n), 0),
    )


def _mixes(model: Any) -> bool:
    """Whether states pass from token to token otherwise than through attention: recurrences, causal convolutions."""
    return getattr(type(model), "_is_stateful", False) or any(isinstance(m, nn.Conv1d) for m in model.modules())
