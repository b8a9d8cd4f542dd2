"""What does not go together with learning from preferences."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank.config.run_sections import RunSections
from lowrank.training.losses.objective_kinds import KEYS, MEASURED, OBJECTIVE_KINDS

_OF_TOKENS = (("data", "train_on"), ("training", "label_smoothing_factor"), ("training", "z_loss"))
"""What is about the next token alone."""


def of_preferences(config: RunSections) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys, and why they do not go together."""
    training, data = config.training, config.data
    if not config.preferring:
        if training.metric_for_best_model == "margin" and not config.tasked:
            why = "margin is measured of preferences and by the task reward, and training.objective is sft"
            yield ("training.metric_for_best_model", "training.objective"), why
        return
    name, kind = training.objective, OBJECTIVE_KINDS[training.objective]
    if config.tasked:
        why = f"{name} learns from answers of a causal language model, and model.task is {config.model.task}"
        yield ("training.objective", "model.task"), why
    if data.streaming:
        yield ("data.streaming", "training.objective"), f"{name} reads all rows before it begins; leave it out"
    if data.too_long == "split":
        yield ("data.too_long", "training.objective"), "the answers to one prompt are not split; take truncate"
    if training.loss_type is not None and len(kind.loss_types) > 1 and training.loss_type not in kind.loss_types:
        why = f"{name} has {', '.join(kind.loss_types)}, and not {training.loss_type}"
        yield ("training.loss_type", "training.objective"), why
    if training.reference == "adapter" and config.model.adapter is None:
        why = "there is no adapter to begin with: name it, or leave reference out"
        yield ("training.reference", "model.adapter"), why
    if training.reference == "base" and config.adapter.method in ("full", "bias"):
        why = f"{config.adapter.method} has no adapter to leave out: the reference is the base as it begins anyway"
        yield ("training.reference", "adapter.method"), why
    if getattr(config.adapter, "init_lora_weights", None) == "eva":
        yield ("adapter.init_lora_weights", "training.objective"), "eva looks at batches of answers to learn; take true"
    known = ("loss", *MEASURED, "exact_match")
    if training.metric_for_best_model not in known:
        why = f"{name} does not measure {training.metric_for_best_model}; take one of {', '.join(known)}"
        yield ("training.metric_for_best_model", "training.objective"), why


def idle_for_objective(config: RunSections) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that change nothing for the objective, and why; for the next token those of preferences."""
    name = config.training.objective
    kind = OBJECTIVE_KINDS.get(name)
    for key in KEYS:
        if kind is None or key not in kind.keys:
            yield (f"training.{key}", "training.objective"), f"does nothing for {name}; leave it out"
    if kind is None:
        return
    if kind.smooths and (loss_type := config.training.loss_type or kind.loss_types[0]) not in kind.smooths:
        yield ("training.label_smoothing", "training.loss_type"), f"does nothing for {loss_type}; leave it out"
    for section, key in _OF_TOKENS:
        yield (f"{section}.{key}", "training.objective"), f"does nothing for {name}; leave it out"
