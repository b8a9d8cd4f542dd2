"""The five sections of a run's config: every field with its type, default and meaning."""

from __future__ import annotations

import re
from datetime import date
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, field_validator, model_validator

from lowrank.adapters.config import AdaLoraConfig, LoraConfig
from lowrank.errors import InputError
from lowrank.paths import as_written, expanded
from lowrank.quantisers.registry import DEFAULT, QUANTISERS


def _path(written: str) -> str:
    try:
        return expanded(written)
    except InputError as error:
        fix = f"; {error.fix[:1].lower()}{error.fix[1:].rstrip('.')}" if error.fix else ""
        raise ValueError(f"{error.what}{fix}") from None


PathText = Annotated[str, AfterValidator(_path), PlainSerializer(as_written, return_type=str, when_used="json")]
"""A file, a folder, or a name on the hub; `~` and `$NAME` are replaced when the config is read."""


def _day(written: str) -> str:
    try:
        return date.fromisoformat(written).isoformat()
    except ValueError:
        raise ValueError(f"{written!r} is no date; write one as 2026-11-26") from None


def _countable(tokens: int) -> int:
    if tokens >= 2**31:
        raise ValueError(f"{tokens:.3g} tokens are more than can be counted; write a number below 2**31")
    return tokens


Tokens = Annotated[int, Field(ge=2), AfterValidator(_countable)]

MAX_SEED = 2**32 - 1


if TYPE_CHECKING:  # to type checkers it is a text: they do not read tables
    QuantMethod: TypeAlias = str
else:
    QuantMethod = Literal[tuple(QUANTISERS)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(_Section):
    """The base model."""

    name_or_path: PathText
    """A folder with a saved model (relative to the current folder), or a name on the hub."""

    revision: str | None = None
    """Branch, tag or commit of a hub repository."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the base's weights are held in; auto takes the checkpoint's."""

    attention: Literal["auto", "eager", "sdpa", "segments", "flash", "flex", "paged"] = "auto"
    """Attention backend: auto takes the fastest that is exact for this model and machine."""

    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default the accelerator if there is one."""

    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""


class QuantizationSection(_Section):
    """The base is held in few bits, and the adapter is trained over it (QLoRA)."""

    quant_method: QuantMethod = DEFAULT
    """The library that quantises. What begins with load_in or bnb is about bitsandbytes."""

    bits: int | None = None
    """How many bits a weight has, for other libraries: torchao 8."""

    load_in_4bit: bool = False
    """Four bits a weight."""

    load_in_8bit: bool = False
    """Eight bits a weight."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values that a 4-bit weight can have."""

    bnb_4bit_use_double_quant: bool = False
    """Quantise the scales as well: 0.4 bits a weight less."""

    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What products are computed in."""

    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """What packed weights are stored as; sharding needs the model's own dtype."""

    @property
    def width(self) -> int:
        """How many bits a weight has."""
        return self.bits or (4 if self.load_in_4bit else 8)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.quant_method != DEFAULT and self.bits is None:
            raise ValueError(f"bits is not set, and {self.quant_method} is told by it how many to take")
        if self.quant_method == DEFAULT and self.load_in_4bit == self.load_in_8bit:
            given = str(self.load_in_4bit).lower()
            raise ValueError(
                f"load_in_4bit is {given}, and so is load_in_8bit; set one to true, or leave the section out"
            )
        return self


class LoraSection(LoraConfig):
    """LoRA."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: Literal["lora"] = "lora"
    """LoRA: low-rank factors beside frozen weights; the default."""


class DoraSection(LoraConfig):
    """DoRA."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: Literal["dora"]
    """DoRA: the direction of each weight by low-rank factors, its magnitude by a vector."""

    use_dora: Literal[True] = True
    """Always true here; `method: dora` says it."""


class AdaLoraSection(AdaLoraConfig):
    """AdaLoRA."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: Literal["adalora"]
    """AdaLoRA: low-rank factors whose ranks shrink to a budget where they matter least."""


class FullSection(_Section):
    """Every weight of the model trains; no adapter."""

    method: Literal["full"]
    """Every weight of the model."""


class BiasSection(_Section):
    """Only the biases train (BitFit); no adapter."""

    method: Literal["bias"]
    """The biases alone (BitFit)."""


AdapterSection = Annotated[
    LoraSection | DoraSection | AdaLoraSection | FullSection | BiasSection, Field(discriminator="method")
]


Format = Literal["messages", "sharegpt", "preference", "prompt_completion", "alpaca", "text"]


class SourceSection(_Section):
    """One of several sources."""

    path: PathText
    """A file, a folder, or a name on the hub."""

    format: Format | None = None
    """What its rows hold; found by looking at them where it is not named."""

    weight: float | None = Field(default=None, gt=0)
    """Its share of an epoch's examples, relative to the other sources' weights; by default it is taken as it is."""

    split: str = "train"
    """Which split of a data set that has several."""

    subset: str | None = None
    """Which configuration of a data set on the hub."""

    columns: dict[str, str] | None = None
    """Where the keys of a format are found in its rows; see data.columns."""


class DataSection(_Section):
    """What is trained on."""

    train: PathText | list[PathText | SourceSection]
    """The training data: a file or a folder (relative to the current folder), or a name on the hub. A pattern such as
    data/*.jsonl stands for several files. They are .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .md, and may be
    compressed (.gz, .zst, .bz2, .xz). A list mixes several sources, all with a weight or none."""

    eval: PathText | Annotated[float, Field(gt=0, lt=1)] | list[PathText | SourceSection] | None = None
    """The evaluation data, in the same forms; or a share of the training rows to set aside, such as 0.05."""

    chat_template: PathText | None = None
    """chatml, llama3, gemma, phi, mistral or plain; or a .jinja file. By default the tokenizer's own."""

    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_day)] | None = None
    """The date, as 2026-11-26, for chat templates that write the day's (Llama 3.2's, gpt-oss'); by default the day on
    which the run began, which a resumed run keeps."""

    format: Format | None = None
    """What a row holds; found by looking at the rows where it is not named."""

    columns: dict[str, str] | None = None
    """Where the keys of a format are found in the rows, such as {prompt: question, completion: answer}. Known without
    it are question, query and input for prompt, answer, response and output for completion."""

    bad_rows: Literal["error", "skip"] = "error"
    """What is done with rows that cannot be used; skip counts them, lists the first ten, and refuses more than 5 %."""

    max_length: Tokens = 1024
    """The most tokens in an example."""

    too_long: Literal["error", "drop", "truncate", "split"] = "error"
    """What is done with a longer one; split cuts plain text into several examples."""

    streaming: bool = False
    """Read, tokenise and pack rows while training goes on, for data that does not fit; needs training.max_steps."""

    packing: bool = True
    """Several examples in one row, without padding and without seeing one another."""

    share_prefixes: Literal["auto"] | bool = "auto"
    """What examples in a pack begin with in common (a system prompt, a document) is computed once: each learns what it
    would alone. Auto does so where it saves 5 % of the tokens and the model allows it, but not with dropout or NEFTune,
    which would draw once for all of them. A step holds as many tokens of examples as without."""

    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    """Which tokens carry loss."""

    max_train_rows: int | None = Field(default=None, ge=1)
    """Read only so many rows of the training data."""

    max_eval_rows: int | None = Field(default=None, ge=1)
    """Read only so many rows of the evaluation data."""


class ParameterGroup(_Section):
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


Optim = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "muon",
    "sgd",
]


class TrainingSection(_Section):
    """How it is trained."""

    output_dir: PathText
    """The run's folder (relative to the current folder); it must not hold a run already."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""

    max_steps: int = -1
    """Optimiser steps; a positive number stands before num_train_epochs."""

    tokens_per_batch: Tokens | None = None
    """Tokens in one pack (data.packing: true); data.max_length by default."""

    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows in a padded batch (data.packing: false)."""

    per_device_eval_batch_size: int = Field(default=8, ge=1)
    """Rows in a batch of the evaluation, prompts that are answered at a time."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
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

    parameter_groups: list[ParameterGroup] = []
    """Learning rate and weight decay by parameter name; of several that fit, the first."""

    lr_scheduler_type: Literal[
        "cosine", "cosine_with_min_lr", "linear", "constant", "inverse_sqrt", "warmup_stable_decay"
    ] = "cosine"
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
    """So much of each token's probability is asked for evenly over the vocabulary."""

    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits from drifting; 1e-4 is usual."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""

    gradient_checkpointing: bool | Literal["selective", "offload"] = False
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

    num_processes: int | None = Field(default=None, ge=1)
    """How many processes share each step's batches; refused where another number was launched. Launch them with
    torchrun --nproc_per_node N -m lowrank train CONFIG."""

    fsdp: bool = False
    """Shard the frozen base between the processes (FSDP2) instead of holding all of it in each."""

    report_to: str | list[str] = "auto"
    """Trackers: tensorboard, wandb, trackio, mlflow and others that accelerate knows, one or a list; none; auto is
    tensorboard where it is installed. metrics.jsonl and report.html are written anyway."""

    logging_steps: int = Field(default=1, ge=1)
    """Lines of progress, where the output is no terminal, come every so many steps."""

    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate the loss every so many steps; after training it is done anyway."""

    eval_on_start: bool = True
    """Evaluate before the first step too: what the base can do is what the result is compared with."""

    save_steps: int | None = Field(default=None, ge=1)
    """Write a checkpoint every so many steps."""

    save_minutes: float | None = Field(default=10.0, gt=0)
    """Write a checkpoint when so many minutes have gone by since the last one, and after the last step. Null writes
    them every save_steps alone, or, where that is null too, only when the run is stopped."""

    save_total_limit: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay; the best one stays besides."""

    early_stopping_patience: int | None = Field(default=None, ge=1)
    """End the run after so many evaluations in a row without a better one (by metric_for_best_model)."""

    load_best_model_at_end: bool = False
    """Save the weights of the best evaluation (by metric_for_best_model) instead of the last; needs eval_steps."""

    metric_for_best_model: Literal["loss", "exact_match"] = "loss"
    """What the best evaluation is judged by: the lowest loss, or the highest exact match."""

    max_skipped_steps: int = Field(default=5, ge=0)
    """A step whose loss or gradients are not finite is skipped; more of them in a row end the run."""

    predict_with_generate: bool = False
    """Also generate an answer to every evaluation row and compare it with the row's own."""

    generation_max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated answer."""

    exact_match: Literal["text", "json"] = "text"
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
