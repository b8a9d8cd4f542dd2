"""Which runs of a sweep go through the model together, and how they are put on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils import set_seed

from lowrank.config import RunConfig
from lowrank.config.sections import TrainingSection
from lowrank.recipes.parts.batches import batch_plan, fitting, step_size
from lowrank.recipes.parts.beginning import new_run
from lowrank.recipes.parts.prepare import put_in
from lowrank.recipes.parts.setup import Setup
from lowrank.recipes.parts.sharing import drops_out, if_exact
from lowrank.training.losses.supervised import HiddenLoss
from lowrank.training.machine.ranks import ALONE
from lowrank.training.run import Run
from lowrank.training.steps import run_length

OWN = {
    *("output_dir", "seed", "num_train_epochs", "max_steps", "gradient_accumulation_steps", "tokens_per_step"),
    *("learning_rate", "optim", "loraplus_lr_ratio", "loraplus_lr_embedding", "lr_scheduler_type", "min_lr_ratio"),
    *("lr_decay_ratio", "warmup_ratio", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "max_skipped_steps", "logging_steps", "eval_steps"),
}
"""Of the training section: what each run of a pass has for itself. In all else, but for the adapter, they are alike."""

_PLAIN: Mapping[str, Sequence[Any]] = {
    "method": ["lora"],
    "bias": ["none"],
    "lora_dropout": [0.0],
    "lora_bias": [False],
    "use_dora": [False],
    "init_lora_weights": [True, False, "gaussian", "orthogonal"],
    "modules_to_save": [None],
    "target_parameters": [None],
    "trainable_token_indices": [None],
}
"""Of the adapter: what is exact where others are on the model too."""


def why_alone(config: RunConfig) -> str | None:
    """What keeps a run from a pass with others; None where nothing does."""
    adapter, data, training = config.adapter.model_dump(), config.data, config.training
    for name, kept in _PLAIN.items():
        if name in adapter and adapter[name] not in kept:
            return f"adapter.{name} is {adapter[name]}"
    reasons = {
        "the base is quantised": config.quantization is not None,
        "model.task is not the next token": config.tasked,
        "model.adapter is set": config.model.adapter is not None,
        f"training.objective is {training.objective}": config.preferring,
        "data.packing is false": not data.packing,
        "data.streaming is true": data.streaming,
        "training.parameter_groups is set": bool(training.parameter_groups),
        "training.neftune_noise_alpha is set": training.neftune_noise_alpha is not None,
        "training.torch_compile is true": training.torch_compile,
        "training.use_liger_kernel is true": training.use_liger_kernel,
        "training.fsdp is true": training.fsdp,
        "training.offload is not none": training.offload != "none",
        "training.load_best_model_at_end is true": training.load_best_model_at_end,
        "training.early_stopping_patience is set": training.early_stopping_patience is not None,
    }
    return next((why for why, so in reasons.items() if so), None)


def in_common(config: RunConfig) -> str:
    """What runs of one pass are alike in."""
    values = config.model_dump(mode="json", exclude={"adapter": True, "training": OWN})
    return json.dumps(values, sort_keys=True)


def why_apart(setup: Setup) -> str | None:
    """What of this model keeps runs from going through it together; None where nothing does."""
    if type(setup.loss) is not HiddenLoss:
        return f"the loss is {setup.loss.why}"
    return "the model's own dropout draws for each token of a pack" if drops_out(setup.model) else None


def one_more(first: Setup, config: RunConfig, name: str) -> Setup:
    """Puts another run's adapter on the model, as that run would have begun alone, and plans its batches.

    Args:
        first: The run that loaded the model and read the rows.
        config: Of the other one; alike in what runs of a pass are.
        name: Of its adapter.
    """
    data, training, model = config.data, config.training, first.model
    set_seed(training.seed)
    assert first.plan.examples is not None, "rows that are not streamed"
    plan = fitting(batch_plan(data, training, first.plan.examples, first.tokenizer), None, model, first.tokenizer)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    put_in(model, config.adapter, config.model, plan, name=name)
    plan = if_exact(data.share_prefixes, model, plan)
    size = step_size(data, training, ALONE, plan)
    length = run_length(plan, size, epochs=training.num_train_epochs, max_steps=training.max_steps)
    return replace(first, plan=plan, size=size, length=length)


def run_of(training: TrainingSection, setup: Setup, name: str) -> Run:
    """Optimiser and schedule over what trains now: this run's adapter alone."""
    run = new_run(training, setup)
    run.adapter = name
    return run
