"""What does not go together with a task other than the next token."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank.config.run_sections import RunSections
from lowrank.tasks.kinds_of_task import LABEL_KEYS, TASK_KINDS

_OF_TEXT = {
    "data": ("format", "chat_template", "date", "train_on", "share_prefixes"),
    "training": ("predict_with_generate", "generation_max_new_tokens", "exact_match", "z_loss", "tokens_per_batch"),
}
"""What is about answers in words, or about packs."""
_NOT_YET = ("fsdp", "torch_compile", "use_liger_kernel")


def of_task(config: RunSections) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys, and why they do not go together."""
    if not config.tasked:
        yield from _without_task(config)
        return
    task, training, data = str(config.model.task), config.training, config.data
    if data.packing and "packing" in data.model_fields_set:
        yield ("data.packing", "model.task"), f"rows of {task} are padded to the longest of a batch; leave it out"
    if data.streaming:
        yield ("data.streaming", "model.task"), f"{task} looks at all labels before it begins; leave it out"
    if data.too_long == "split":
        yield ("data.too_long", "model.task"), f"rows of {task} have one label and are not split; take truncate"
    if config.model.adapter is not None:
        yield ("model.adapter", "model.task"), f"a run of {task} begins with an adapter of its own; leave it out"
    if config.quantization is not None:
        yield ("quantization", "model.task"), f"the head of {task} is new and trains, and would be held in few bits"
    for name in _NOT_YET:
        if getattr(training, name):
            yield (f"training.{name}", "model.task"), f"it is not made for {task}; leave it out"
    if training.offload != "none":
        yield ("training.offload", "model.task"), f"it is not made for {task}; leave it out"
    if getattr(config.adapter, "init_lora_weights", None) == "eva":
        yield ("adapter.init_lora_weights", "model.task"), "eva would look at what pads rows, too; take another start"
    named = getattr(config.adapter, "task_type", None)
    if named not in (None, TASK_KINDS[task].task_type):
        why = f"model.task: {task} is peft's {TASK_KINDS[task].task_type}; leave it out"
        yield ("adapter.task_type", "model.task"), why
    known = ("loss", *TASK_KINDS[task].metrics)
    if training.metric_for_best_model not in known:
        why = f"{task} does not measure {training.metric_for_best_model}; take one of {', '.join(known)}"
        yield ("training.metric_for_best_model", "model.task"), why


def _without_task(config: RunSections) -> Iterator[tuple[tuple[str, ...], str]]:
    named = config.training.metric_for_best_model
    tasks = [task for task, kind in TASK_KINDS.items() if named in kind.metrics]
    if config.model.task is not None and tasks and not config.preferring:
        why = f"{named} is measured by {', '.join(tasks)}, and model.task is {config.model.task}"
        yield ("training.metric_for_best_model", "model.task"), why


def idle_for_task(config: RunSections) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that change nothing for the task, and why; for the next token those of tasks."""
    if config.tasked:
        for section, names in _OF_TEXT.items():
            for name in names:
                yield (f"{section}.{name}", "model.task"), f"does nothing for {config.model.task}; leave it out"
        for key in LABEL_KEYS:
            if key not in TASK_KINDS[str(config.model.task)].wishes:
                yield (key, "model.task"), f"does nothing for {config.model.task}; leave it out"
    elif config.model.task is not None:
        for key in ("model.problem_type", "training.class_weights"):
            yield (key, "model.task"), "is about sequence_classification; leave it out"
