"""All that stands before the first step of a task other than the next token."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank.attention import AttentionChoice
from lowrank.config import RunConfig
from lowrank.config.sections import ModelSection
from lowrank.models import Head
from lowrank.recipes.parts.batches import refuse_what_does_not_fit, step_size
from lowrank.recipes.parts.prepare import base_model, base_tokenizer, put_in, swap_attention
from lowrank.recipes.parts.products import choose_products
from lowrank.recipes.parts.setup import Setup, crowding, in_products
from lowrank.recipes.parts.task_rows import task_examples, task_plan
from lowrank.tasks.kinds_of_task import TASK_KINDS
from lowrank.tasks.task import Task
from lowrank.training.machine.ranks import ALONE, Ranks
from lowrank.training.steps import run_length
from lowrank.training.transforms.recompute import recompute_activations


def set_up_task(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> Setup:
    """Reads the rows, then loads the model with a head for their labels.

    Args:
        config: Of the run.
        device: Of this process.
        ranks: The run's processes.

    Raises:
        InputError: something in the config, the model or the data cannot be used.
    """
    training = config.training
    tokenizer = base_tokenizer(config.model, None)
    task, train, held_rows = task_examples(config, tokenizer)
    plan = task_plan(config.training, task, train, tokenizer, shuffle=True)
    held_out = None if held_rows is None else task_plan(config.training, task, held_rows, tokenizer, shuffle=False)
    model = base_model(config.model, None, head=head_of(task, tokenizer))
    dtype = model.dtype
    for examples in (train, held_rows):
        if examples is not None:
            refuse_what_does_not_fit(examples, tokenizer, model)
    put_in(model, config.adapter, config.model, plan, task_type=TASK_KINDS[task.name].task_type)
    products = choose_products(config.compute_dtype, model, dtype, None)
    attention = task_attention(model, config.model)
    size = step_size(config.data, training, ranks, plan)
    length = run_length(plan, size, epochs=training.num_train_epochs, max_steps=training.max_steps)
    if training.gradient_checkpointing:
        recompute_activations(model, training.gradient_checkpointing)
    return Setup(
        tokenizer=tokenizer,
        plan=plan,
        size=size,
        length=length,
        held_out=held_out,
        exam=None,
        model=model,
        dtype=dtype,
        products=products,
        attention=attention,
        loss=in_products(task.loss(), model, products.dtype),
        plain_loss=in_products(task.loss(plain=True), model, products.dtype),
        date=None,
        ends=[],
        crowded=crowding(device),
        offloaded=None,
        task=task,
    )


def head_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> Head:
    """What the task puts on a base."""
    settings = {**task.settings, "pad_token_id": tokenizer.pad_token_id}
    return Head(TASK_KINDS[task.name].auto_class, settings, task.name)


def task_attention(model: PreTrainedModel, section: ModelSection) -> AttentionChoice:
    """The attention of a decoder is swapped as in other runs; an encoder, which looks both ways, keeps its own."""
    if section.attention == "auto" and not any(getattr(module, "is_causal", False) for module in model.modules()):
        return AttentionChoice(model.config._attn_implementation or "eager", "the base's own: it looks both ways")
    return swap_attention(model, section, packing=False)
