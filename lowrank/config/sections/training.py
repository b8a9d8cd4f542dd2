"""How it is trained."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lowrank.config.sections.choices import Comparison, LossType, Metric, Objective, Optim, Schedule
from lowrank.config.sections.section import OnResume, PathText, Section, Tokens
from lowrank.training.transforms.recompute_modes import RecomputeMode

MAX_SEED = 2**32 - 1


class ParameterGroup(Section):
    """What some of the parameters are trained with."""

    pattern: str
    """A regular expression that is searched for in the parameter's name."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Their highest learning rate; the run's by default."""

    weight_decay: float | None = Field(default=None, ge=0)
    """Their weight decay; the run's by default."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class TrainingSection(Section):
    """How it is trained."""

    output_dir: Annotated[PathText, OnResume.FREE]
    """The run's folder (relative to the current folder); it must not hold a run already."""

    objective: Objective = "sft"
    """What is learned: sft, the next token of an answer; dpo, ipo, simpo, cpo and orpo, to tell a chosen answer from
    rejected ones; kto, wanted answers from unwanted ones."""

    beta: float | None = Field(default=None, gt=0)
    """Of preferences: how strongly answers are held to the reference, or how sharply they are told apart; 0.1 by
    default, simpo's is 2."""

    loss_type: LossType | None = None
    """Of dpo (sigmoid, hinge, robust, apo_zero, apo_down), cpo (sigmoid, hinge) and kto (kto, apo_zero_unpaired): the
    loss's form; the first by default."""

    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """Of dpo, cpo and simpo: the share of the pairs whose order is taken to be wrong; 0 by default."""

    simpo_gamma: float | None = Field(default=None, ge=0)
    """Of simpo: by how much the chosen answer is to be better; 0.5 by default."""

    cpo_alpha: float | None = Field(default=None, ge=0)
    """Of cpo and simpo: weight of the chosen answer's own loss; 1 by default, simpo's is 0."""

    desirable_weight: float | None = Field(default=None, gt=0)
    """Of kto: weight of wanted answers; 1 by default."""

    undesirable_weight: float | None = Field(default=None, gt=0)
    """Of kto: weight of unwanted answers; 1 by default. With answers of one kind n times as many as of the other, that
    one n times as much."""

    reference: Literal["base", "adapter"] | None = None
    """Of dpo, ipo and kto, what answers are compared with: base, with no adapter; adapter, the model as training
    begins, which is the default with model.adapter."""

    num_train_epochs: Annotated[float, OnResume.FREE] = Field(default=1.0, gt=0)
    """Passes over the data."""

    max_steps: Annotated[int, OnResume.FREE] = -1
    """Optimiser steps; a positive number stands before num_train_epochs."""

    tokens_per_batch: Tokens | None = None
    """Tokens in one pack (data.packing: true); data.max_length by default."""

    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows in a padded batch (data.packing: false)."""

    per_device_eval_batch_size: Annotated[int, OnResume.FREE_UNLESS_JUDGED] = Field(default=8, ge=1)
    """Rows in a batch of the evaluation, prompts that are answered at a time."""

    gradient_accumulation_steps: Annotated[int, OnResume.FREE] = Field(default=1, ge=1)
    """Batches in an optimiser step for each process. The loss is normalised over all of them at once."""

    tokens_per_step: Tokens | None = None
    """Instead of that: as many batches in a step, over all processes, as hold no more than so many tokens."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """The highest learning rate."""

    optim: Optim = "adamw_torch_fused"
    """The optimiser. 8bit ones, lion and paged ones are bitsandbytes'; paged ones need an accelerator."""

    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """LoRA+: lora_B learns so many times as fast as lora_A; 16 is the paper's."""

    loraplus_lr_embedding: float = Field(default=1e-6, gt=0)
    """With LoRA+, the learning rate of adapted embeddings."""

    parameter_groups: list[ParameterGroup] = Field(default=[])
    """Learning rate and weight decay by parameter name; of several that fit, the first."""

    lr_scheduler_type: Schedule = "cosine"
    """How the learning rate goes down after the warm-up."""

    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Of cosine_with_min_lr and warmup_stable_decay: the lowest learning rate, as a share of the highest."""

    lr_decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Of warmup_stable_decay: the share of the steps, at the end, in which the learning rate falls."""

    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""

    warmup_steps: int = Field(default=0, ge=0)
    """The same in steps; a positive number stands before warmup_ratio."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, on matrices."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first moment."""

    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second moment."""

    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's denominator."""

    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """NEFTune: noise of this strength on the input embeddings while training; 5 to 15 are usual."""

    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """So much of each token's probability is asked for evenly over the vocabulary; of a label's, over the classes."""

    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Of sequence_classification: how much rows of each class weigh in the loss, such as {spam: 4.0}; 1 for those not
    named. With balanced each class as much as it is rare: rows / (classes x rows of the class)."""

    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits from drifting; 1e-4 is usual."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""

    gradient_checkpointing: bool | RecomputeMode = False
    """Recompute activations in the backward pass: less memory, about a third slower. With selective only what is cheap,
    products and attention are kept: less of both. With offload, what is kept goes from the accelerator to the host's
    memory."""

    torch_compile: bool = False
    """Compile the model's layers, one by one; it takes a minute or two before the first step."""

    use_liger_kernel: bool = False
    """On CUDA: Liger's kernels for norms and gated activations (pip install 'lowrank[liger]'), refused where they would
    change what the model computes. The loss is computed from hidden states with or without them."""

    seed: int = 42
    """Of the adapter's start, the order of the data, and dropout."""

    deterministic: bool = False
    """On CUDA: kernels that give the same bits each time, so that a resumed run ends byte for byte as one that never
    stopped; slower, and refused where an operation has none. On a CPU it is so anyway."""

    num_processes: Annotated[int | None, OnResume.FREE] = Field(default=None, ge=1)
    """How many processes share each step's batches; refused where another number was launched. Launch them with
    torchrun --nproc_per_node N -m lowrank train CONFIG."""

    fsdp: Annotated[bool, OnResume.FREE] = False
    """Shard the frozen base between the processes (FSDP2) instead of holding all of it in each."""

    offload: Annotated[Literal["none", "layers"], OnResume.FREE] = "none"
    """With layers the frozen base's layers stay in the host's pinned memory, and the card holds two of them: the one
    that computes and the next. It implies gradient_checkpointing. On a CPU layers lie in the model's files, and those
    that are not computing take no memory."""

    report_to: Annotated[str | list[str], OnResume.FREE] = "auto"
    """Trackers: tensorboard, wandb, trackio, mlflow and others that accelerate knows, one or a list; none; auto is
    tensorboard where it is installed. metrics.jsonl and report.html are written anyway."""

    logging_steps: Annotated[int, OnResume.FREE] = Field(default=1, ge=1)
    """Lines of progress, where the output is no terminal, come every so many steps."""

    eval_steps: Annotated[int | None, OnResume.FREE_UNLESS_JUDGED] = Field(default=None, ge=1)
    """Evaluate the loss every so many steps; after training it is done anyway."""

    eval_on_start: bool = True
    """Evaluate before the first step too: what the base (or the adapter of model.adapter) can do is what the result is
    compared with."""

    save_steps: Annotated[int | None, OnResume.FREE] = Field(default=None, ge=1)
    """Write a checkpoint every so many steps."""

    save_minutes: Annotated[float | None, OnResume.FREE] = Field(default=10.0, gt=0)
    """Write a checkpoint when so many minutes have gone by since the last one, and after the last step. Null writes
    them every save_steps alone, or, where that is null too, only when the run is stopped."""

    save_total_limit: Annotated[int, OnResume.FREE] = Field(default=2, ge=1)
    """How many of the newest checkpoints stay; the best one stays besides."""

    early_stopping_patience: int | None = Field(default=None, ge=1)
    """End the run after so many evaluations in a row without a better one (by metric_for_best_model)."""

    load_best_model_at_end: bool = False
    """Save the weights of the best evaluation (by metric_for_best_model) instead of the last; needs eval_steps."""

    metric_for_best_model: Metric = "loss"
    """What the best evaluation is judged by: the lowest loss, or the highest exact match."""

    max_skipped_steps: int = Field(default=5, ge=0)
    """A step whose loss or gradients are not finite is skipped; more of them in a row end the run."""

    predict_with_generate: Annotated[bool, OnResume.FREE_UNLESS_JUDGED] = False
    """Also generate an answer to every evaluation row and compare it with the row's own."""

    generation_max_new_tokens: Annotated[int, OnResume.FREE_UNLESS_JUDGED] = Field(default=128, ge=1)
    """Longest generated answer."""

    exact_match: Annotated[Comparison, OnResume.FREE_UNLESS_JUDGED] = "text"
    """How answers are compared: as text, or as JSON values."""

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps is {self.max_steps}; write a number of steps from 1 on, or -1 for num_train_epochs"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}; write a whole number from 0 to {MAX_SEED}")
        return self
