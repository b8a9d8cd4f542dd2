"""All that stands before the first step: rows to packs, the model with its adapter and attention, the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank.attention import AttentionChoice
from lowrank.config import RunConfig
from lowrank.config.sections import TrainingSection
from lowrank.data import BatchPlan, end_tokens
from lowrank.data.batches.order import Batches
from lowrank.data.supervision.choose_template import added_prompt, missing_prompt
from lowrank.data.supervision.template import writes_date
from lowrank.errors import InputError
from lowrank.models import positions_of, usable_device
from lowrank.ops.cross_entropy import LossOptions
from lowrank.recipes.parts.batches import SAMPLE_ROWS, fitting, read_batches, step_size
from lowrank.recipes.parts.exam import Exam, exam_of
from lowrank.recipes.parts.preference_rows import read_preferences
from lowrank.recipes.parts.prepare import base_model, base_tokenizer, put_in, swap_attention
from lowrank.recipes.parts.products import Products, choose_products
from lowrank.recipes.parts.sharing import drawing, if_exact, unless_it_drops_out
from lowrank.storage.machine_load import load_since, usage_now
from lowrank.tasks.task import Task
from lowrank.training.losses.objective import Numbers
from lowrank.training.losses.objective_kinds import OBJECTIVE_KINDS
from lowrank.training.losses.objectives import OBJECTIVES
from lowrank.training.losses.preference import PreferenceLoss
from lowrank.training.losses.supervised import Autocast, LogProbs, Loss, supervised_loss
from lowrank.training.machine.ranks import ALONE, Ranks
from lowrank.training.steps import Group, Length, StepSize, run_length
from lowrank.training.transforms.gates import fused_gates
from lowrank.training.transforms.keep_less import keep_less
from lowrank.training.transforms.layer_offload import Offloaded, offload_layers
from lowrank.training.transforms.layers import compile_layers
from lowrank.training.transforms.liger import use_liger
from lowrank.training.transforms.norms import lean_norms
from lowrank.training.transforms.recompute import recompute_activations
from lowrank.training.transforms.rotary import fused_rotary
from lowrank.training.transforms.sharding import shard
from lowrank.training.transforms.shared_inputs import share_inputs
from lowrank.weights.files.notes import stop_at

L = TypeVar("L", bound=Loss)


@dataclass(frozen=True)
class Setup:
    """A run that has not begun.

    Attributes:
        tokenizer: The base's, with the chat template that is used.
        plan: The order of the training batches.
        size: Of an optimiser step.
        length: Optimiser steps.
        held_out: The evaluation's batches, None where the config names no rows for it.
        exam: The questions whose answers evaluations compare, None where the config asks for the loss alone.
        model: Adapter in, attention swapped.
        dtype: What the base was loaded in, and is saved in.
        products: What it is computed in.
        attention: What was chosen, and why.
        loss: Exact for this model.
        plain_loss: The same without label smoothing and z-loss, for evaluations.
        date: What the chat template writes as the day's date, None for the day it is.
        ends: The tokens that end the model's answers: those that end trained turns first.
        crowded: What to do about other programs on the cores that the run computes with; None where there are none.
        offloaded: The layers whose weights come and go, None where all stay.
        task: What is learned, None for the next token.
        judge: The loss, where it is of preferences.
    """

    tokenizer: PreTrainedTokenizerBase
    plan: Batches
    size: StepSize
    length: Length
    held_out: BatchPlan | None
    exam: Exam | None
    model: PreTrainedModel
    dtype: torch.dtype
    products: Products
    attention: AttentionChoice
    loss: Loss
    plain_loss: Loss
    date: str | None
    ends: list[int]
    crowded: str | None
    offloaded: Offloaded | None
    task: Task | None = None
    judge: PreferenceLoss | None = None

    def prepare(self, ranks: Ranks) -> Callable[[Group], None] | None:
        """What is to be known of a step's batches before any is learned from; None where nothing is."""
        judge, model = self.judge, self.model
        return None if judge is None else lambda group: judge.prepare(model, group.batches, group.idle, ranks)

    @property
    def asking(self) -> dict[str, str]:
        """How the model is asked and where its answers end, line by line; of a task what it says."""
        if self.task is not None:
            return {"task": f"{self.task.name}: {self.task.told}"}
        ends = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(self.ends)))
        added, missing = added_prompt(self.tokenizer), missing_prompt(self.tokenizer)
        if added:
            prompt = f"the chat template writes none: {added!r} is added to it, here and in the files that are written"
        else:
            prompt = f"the chat template writes none: {missing!r} is added here, and servers will not add it"
        lines = {"answers end at": ends}
        lines |= {"generation prompt": prompt} if added or missing else {}
        lines |= {"date": f"{self.date or date.today()}, which the chat template writes"} if self.writes_date else {}
        return lines

    @property
    def writes_date(self) -> bool:
        """Whether the rows' text depends on the date."""
        return self.task is None and writes_date(self.tokenizer)


def set_up(config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> Setup:
    """Reads the data, then loads the model: a mistake in a row is found in seconds.

    Args:
        config: Of the run.
        device: Of this process.
        ranks: The run's processes.

    Raises:
        InputError: something in the config, the model or the data cannot be used.
    """
    data, training = config.data, config.training
    tokenizer = base_tokenizer(config.model, data.chat_template)
    drawn = drawing(config.adapter, training)
    if config.preferring:
        plan, held_out = read_preferences(data, training, tokenizer, drawn)
    else:
        plan, held_out = read_batches(data, training, tokenizer, ranks, drawn)

    away = training.fsdp or training.offload == "layers"  # the device has no room for the whole base
    model = base_model(config.model, config.quantization, device="cpu" if away else None)
    dtype = model.dtype
    plan = fitting(plan, held_out, model, tokenizer)
    put_in(model, config.adapter, config.model, plan)
    offloaded = _offloaded(model, training, device)
    products = choose_products(config.compute_dtype, model, dtype, _rigid(training))
    if not (training.torch_compile or training.use_liger_kernel):  # which have norms of their own
        lean_norms(model)
        fused_rotary(model, device)
        if training.gradient_checkpointing or away:  # which keep less still, or hold weights in shards
            fused_gates(model, device)
        else:
            keep_less(model)
        share_inputs(model)
    if training.fsdp:
        shard(model, ranks, device)
    attention = swap_attention(model, config.model, packing=data.packing)
    plan = if_exact(data.share_prefixes, model, unless_it_drops_out(data.share_prefixes, model, plan))
    held_out = None if held_out is None else if_exact(data.share_prefixes, model, held_out)
    size = step_size(data, training, ranks, plan)
    length = run_length(plan, size, epochs=training.num_train_epochs, max_steps=training.max_steps)
    if training.gradient_checkpointing and offloaded is None:
        recompute_activations(model, training.gradient_checkpointing)
    if training.use_liger_kernel:
        use_liger(model)
    if training.torch_compile:
        compile_layers(model)

    loss, plain = _losses(training, model, products.dtype)
    ends = stop_at(model, tokenizer, end_tokens(plan.sample(SAMPLE_ROWS), tokenizer))
    exam = None
    if training.predict_with_generate and held_out is not None:
        exam = exam_of(held_out.examples, tokenizer, data, training, positions_of(model))
    parts = (tokenizer, plan, size, length, held_out, exam, model, dtype, products, attention, loss, plain)
    judge = loss if isinstance(loss, PreferenceLoss) else None
    return Setup(*parts, data.date, ends, crowding(device), offloaded, judge=judge)


def crowding(device: torch.device) -> str | None:
    """What to do about other programs on the cores that a run computes with; None where there are none."""
    return load_since(usage_now()).advice if device.type == "cpu" and torch.get_num_threads() > 1 else None


def own_device(named: str | None, processes: int = 1) -> torch.device:
    """The device of that name, which is the current one from here on; where none is named, or no card by its number,
    whichever accelerator is the current one, or the CPU.

    Args:
        named: By a config.
        processes: Of the run.

    Raises:
        InputError: there is none of that name, or it is one card and each process needs its own.
    """
    if named is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = usable_device(named)
    if device.type == "cuda" and device.index is not None:
        if processes > 1:
            raise InputError(
                f"{named} is one card, and {processes} processes are to share this run",
                where="model.device",
                fix="Leave it out, or set it to cuda: each process takes a card of its own.",
            )
        torch.cuda.set_device(device)
    return device


def _offloaded(model: PreTrainedModel, training: TrainingSection, device: torch.device) -> Offloaded | None:
    """Moves all but the layers to the device, where the config says so."""
    if training.offload == "none":
        return None
    return offload_layers(model, device, training.gradient_checkpointing or True)


def _rigid(training: TrainingSection) -> str | None:
    """What of a run needs products in the dtype of the weights."""
    named = next((name for name in ("fsdp", "torch_compile", "use_liger_kernel") if getattr(training, name)), None)
    return named and f"training.{named} takes the weights as they are"


def _losses(training: TrainingSection, model: PreTrainedModel, products: torch.dtype) -> tuple[Loss, Loss]:
    """What is minimised, and what evaluations measure."""
    plain = in_products(supervised_loss(model), model, products)
    if training.objective in OBJECTIVES:
        judge = preference_loss(training, plain)
        return judge, judge
    options = LossOptions(label_smoothing=training.label_smoothing_factor, z_loss=training.z_loss)
    if options == LossOptions():
        return plain, plain
    return in_products(supervised_loss(model, options), model, products), plain


def preference_loss(training: TrainingSection, log_probs: LogProbs) -> PreferenceLoss:
    """The loss of the objective that a config names, with its numbers."""
    name, kind = training.objective, OBJECTIVE_KINDS[training.objective]
    given = {key: getattr(training, key) for key in kind.defaults if getattr(training, key) is not None}
    loss_type, smoothing = training.loss_type or kind.loss_types[0], training.label_smoothing or 0.0
    numbers = Numbers(**{**kind.defaults, **given}, loss_type=loss_type, label_smoothing=smoothing)
    told = f"{name} ({loss_type})" if loss_type else name
    objective = OBJECTIVES[name](numbers)
    return PreferenceLoss(log_probs, objective, told, paired=kind.paired, referenced=kind.referenced)


def in_products(loss: L, model: PreTrainedModel, products: torch.dtype) -> L | Autocast:
    """The loss; where weights have more digits than products shall have, those are computed with fewer."""
    return Autocast(loss, products) if model.dtype == torch.float32 != products else loss
