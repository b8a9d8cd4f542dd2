"""How good a base or an adapter is, on the evaluation data of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from rich.console import Console

from lowrank.adapters import unwrap
from lowrank.config import RunConfig, load_config
from lowrank.data import check_fits, end_tokens
from lowrank.errors import InputError
from lowrank.models import positions_of, vocabulary_of
from lowrank.paths import expanded
from lowrank.recipes.parts.assess import assess
from lowrank.recipes.parts.batches import evaluation_plan, read_examples, refuse_what_does_not_fit
from lowrank.recipes.parts.exam import exam_of
from lowrank.recipes.parts.preference_assess import assess_preferences
from lowrank.recipes.parts.preference_rows import preference_plan, read_preference_examples
from lowrank.recipes.parts.prepare import base_model, base_tokenizer, swap_attention
from lowrank.recipes.parts.products import choose_products
from lowrank.recipes.parts.reference import begins_with_adapter, knowing_the_reference
from lowrank.recipes.parts.setup import in_products, preference_loss
from lowrank.recipes.parts.sharing import if_exact
from lowrank.recipes.parts.show import open_console
from lowrank.recipes.parts.starting import folder_of, with_start
from lowrank.recipes.parts.task_assess import assess_task
from lowrank.recipes.parts.task_opened import head_in, put_on
from lowrank.recipes.parts.task_rows import task_examples, task_plan
from lowrank.recipes.parts.task_setup import head_of, task_attention
from lowrank.recipes.parts.tasked import with_task
from lowrank.tasks.registry import TASKS
from lowrank.training.callbacks.progress import Screen
from lowrank.training.diagnosis import refuse_broken_weights
from lowrank.training.evaluation.evaluation import Evaluation
from lowrank.training.losses.supervised import supervised_loss
from lowrank.weights import load
from lowrank.weights.files.adapter_file import AdapterFile, open_adapter
from lowrank.weights.files.notes import noted_ends, stop_at


def evaluate(
    config: RunConfig | Mapping[str, Any] | str | Path, adapter: str | Path | None = None, overrides: Sequence[str] = ()
) -> Evaluation:
    """Evaluates, and prints the figures.

    An adapter is asked as it was trained: with the tokenizer and the chat template beside it, unless the config gives
    a template, and on the revision of the base that it names.

    Args:
        config: A config, its sections as a mapping, or the path of one.
        adapter: An adapter's folder; the base alone without it.
        overrides: `section.key=value`, for a mapping or a path.

    Raises:
        InputError: the config names no evaluation data, or something cannot be used.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    adapter = adapter and expanded(adapter)
    config = with_task(with_start(config))
    if config.data.eval is None:
        raise InputError("there is nothing to evaluate on", where="data.eval", fix="Name the evaluation data.")
    console = open_console()
    file = None if adapter is None else open_adapter(adapter)
    config = config if file is None else _at_its_revision(config, file)
    if config.tasked:
        result = _of_task(config, file, console)
        console.print(f"{adapter or config.model.name_or_path} on {config.data.eval}: {result}")
        return result
    if config.preferring:
        result = _of_preferences(config, file, console)
        console.print(f"{adapter or config.model.name_or_path} on {config.data.eval}: {result}")
        return result
    data, training = config.data, config.training
    tokenizer = base_tokenizer(config.model, data.chat_template, None if file is None else file.path)
    _, examples = read_examples(data, tokenizer)
    assert examples is not None, "data.eval is set"
    model = base_model(config.model, config.quantization)
    positions = positions_of(model)
    check_fits(examples, tokenizer, vocabulary_of(model), positions)
    exam = exam_of(examples, tokenizer, data, training, positions) if training.predict_with_generate else None
    if file is not None:
        load(model, file.path)
    noted = [] if file is None else noted_ends(file.path)
    choose_products(config.compute_dtype, model, model.dtype, None)
    stop_at(model, tokenizer, list(dict.fromkeys([*noted, *end_tokens(examples, tokenizer)])))
    swap_attention(model, config.model, packing=data.packing)
    held_out = if_exact(data.share_prefixes, model, evaluation_plan(data, training, examples, tokenizer))
    with Screen(console) as screen:
        result = assess(model, tokenizer, held_out, supervised_loss(model), screen.task, exam)
    if not math.isfinite(result.loss):
        refuse_broken_weights(model, config.model.name_or_path)
    console.print(f"{adapter or config.model.name_or_path} on {len(examples)} examples of {data.eval}: {result}")
    return result


def _of_task(config: RunConfig, file: AdapterFile | None, console: Console) -> Evaluation:
    """A task's figures. A base alone has a head that is new, and random."""
    tokenizer = base_tokenizer(config.model, None, None if file is None else file.path)
    task, _, examples = task_examples(config, tokenizer)
    assert examples is not None, "data.eval is set"
    if file is None:
        set_seed(config.training.seed)
        model = base_model(config.model, None, head=head_of(task, tokenizer))
    else:
        model = base_model(config.model, None, head=head_in(file, task.name))
        put_on(model, file)
        task = TASKS[task.name].of_config(model.config)
        task.refuse_others(examples)
    refuse_what_does_not_fit(examples, tokenizer, model)
    products = choose_products(config.compute_dtype, model, model.dtype, None)
    task_attention(model, config.model)
    plan = task_plan(config.training, task, examples, tokenizer, shuffle=False)
    with Screen(console) as screen:
        return assess_task(model, tokenizer, plan, task, screen.task, products.dtype)


def _of_preferences(config: RunConfig, file: AdapterFile | None, console: Console) -> Evaluation:
    """How an adapter tells better answers from worse; a base alone is its own reference."""
    data, training = config.data, config.training
    tokenizer = base_tokenizer(config.model, data.chat_template, None if file is None else file.path)
    _, examples = read_preference_examples(data, training, tokenizer)
    assert examples is not None, "data.eval is set"
    model = base_model(config.model, config.quantization)
    refuse_what_does_not_fit(examples, tokenizer, model)
    exam = None
    if training.predict_with_generate:
        exam = exam_of(examples, tokenizer, data, training, positions_of(model))
    products = choose_products(config.compute_dtype, model, model.dtype, None)
    swap_attention(model, config.model, packing=data.packing)
    held_out = if_exact(data.share_prefixes, model, preference_plan(data, training, examples, tokenizer, shuffle=False))
    judge = preference_loss(training, in_products(supervised_loss(model), model, products.dtype))
    with Screen(console) as screen:
        if judge.referenced:
            if begins_with_adapter(config.model, training):
                load(model, folder_of(str(config.model.adapter)))
            held_out = knowing_the_reference(held_out, config, model, judge, products.dtype, screen.task)
            if begins_with_adapter(config.model, training):
                unwrap(model)
        if file is not None:
            load(model, file.path)
        noted = [] if file is None else noted_ends(file.path)
        stop_at(model, tokenizer, list(dict.fromkeys([*noted, *end_tokens(examples, tokenizer)])))
        return assess_preferences(model, tokenizer, held_out, judge, screen.task, exam)


def _at_its_revision(config: RunConfig, adapter: AdapterFile) -> RunConfig:
    """The config with the revision of the base that an adapter was trained on.

    Raises:
        InputError: the config names another one.
    """
    revision, named = adapter.revision_of(config.model.name_or_path), config.model.revision
    if revision is None or revision == named:
        return config
    if named is not None and adapter.fingerprint is None:
        raise InputError(
            f"the adapter was trained on revision {revision} of its base, not on {named}", where="model.revision"
        )
    if named is not None:
        return config  # a branch or a tag, perhaps of the same commit: loading compares commits
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": revision})})
