"""The head that a task puts on a base: new with every task, so it trains and is saved with the adapter, as in peft."""

from __future__ import annotations

from torch import nn

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.kinds.kind import HostModule
from lowrank.adapters.modules import bare, base_modules
from lowrank.errors import InputError

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_head(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config, with the head of its `task_type` among `modules_to_save`.

    peft's rule: a classifier's head is what ends in "classifier" or "score", a question answerer's in "qa_outputs".
    Where a model has none of these, its head is what stands beside the base model.

    Raises:
        InputError: the task has a head, and the model none.
    """
    names = _HEADS.get(config.task_type or "")
    if names is None:
        return config
    modules = base_modules(model)
    heads = [path for path in modules if path.endswith(names)] or _beside_base(bare(model))
    if not heads:
        raise InputError(
            f"task_type is {config.task_type}, and this {type(model).__name__} has no head that ends in {names}",
            fix="Load the base for that task (AutoModelForSequenceClassification ...), or leave task_type out.",
        )
    outer = [path for path in heads if not any(path.startswith(f"{other}.") for other in heads)]
    saved = [*(config.modules_to_save or [])]
    covered = [path for path in modules if any(path == name or path.endswith(f".{name}") for name in saved)]
    new = [path for path in outer if not any(f"{path}.".startswith(f"{one}.") for one in covered)]
    return config.model_copy(update={"modules_to_save": [*saved, *new]})


def _beside_base(model: HostModule) -> list[str]:
    """Modules of a classifier next to its base; the head of a language model is none of a classifier's."""
    children = dict(model.named_children())
    if getattr(model, "base_model_prefix", None) not in children:
        return []
    language = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    passed = (children[model.base_model_prefix], language)
    beside = {name: child for name, child in children.items() if not any(child is one for one in passed)}
    return [name for name, child in beside.items() if any(True for _ in child.parameters())]
