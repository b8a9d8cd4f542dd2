"""What cannot be meant together: keys of different sections that rule one another out, or leave one without effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank.adapters.registry import METHODS
from lowrank.config.preference_contradictions import idle_for_objective, of_preferences
from lowrank.config.run_sections import RunSections
from lowrank.config.sections import QuantizationSection
from lowrank.config.task_contradictions import idle_for_task, of_task
from lowrank.quantisers.registry import DEFAULT


@dataclass(frozen=True)
class Contradiction:
    """Keys that do not go together.

    Attributes:
        keys: "section.key" each; the first is the one that the message stands at.
        why: The reason, as what follows the key in a sentence.
    """

    keys: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.why}"


class ContradictionsError(ValueError):
    """All of a config's contradictions.

    Attributes:
        found: One or more.
    """

    def __init__(self, found: list[Contradiction]) -> None:
        self.found = found
        super().__init__("; ".join(map(str, found)))


def contradictions(config: RunSections) -> Iterator[Contradiction]:
    """Whatever in the sections does not go together."""
    method, training, data = config.adapter.method, config.training, config.data
    if config.quantization is not None and method in ("full", "bias"):
        yield Contradiction(
            ("adapter.method", "quantization"),
            f"{method} trains the base's own weights, and quantization holds them in few bits; take one "
            f"of {', '.join(METHODS)}, or leave the section quantization out",
        )
    if config.model.compute_dtype not in ("auto", config.compute_dtype):
        yield Contradiction(
            ("quantization.bnb_4bit_compute_dtype", "model.compute_dtype"),
            f"products are in one dtype, and model.compute_dtype is {config.model.compute_dtype}; leave one out",
        )
    starts_from = getattr(config.adapter, "init_lora_weights", None)
    if starts_from == "loftq" and not (config.quantization and config.quantization.width == 4):
        yield Contradiction(
            ("adapter.init_lora_weights", "quantization"),
            "loftq begins with the error of a 4-bit base; set quantization.load_in_4bit: true",
        )
    if data.eval is None and training.predict_with_generate:
        yield Contradiction(
            ("training.predict_with_generate", "data.eval"), "there is nothing to answer: data.eval is not set"
        )
    if data.eval is None and training.eval_steps is not None:
        yield Contradiction(("training.eval_steps", "data.eval"), "there is nothing to evaluate: data.eval is not set")
    if data.streaming:
        yield from _streaming_alone(config)
    if training.gradient_checkpointing == "selective":
        yield from _selective_alone(config)
    yield from _elsewhere_alone(config)
    yield from (Contradiction(keys, why) for keys, why in (*of_task(config), *of_preferences(config)))
    judged = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "early_stopping_patience": training.early_stopping_patience is not None,
    }
    for name, asked in judged.items():
        if asked and training.eval_steps is None:
            yield Contradiction(
                (f"training.{name}", "training.eval_steps"), "it looks at the evaluations of every eval_steps; set it"
            )
    if training.metric_for_best_model == "exact_match" and not training.predict_with_generate:
        yield Contradiction(
            ("training.metric_for_best_model", "training.predict_with_generate"),
            "exact_match is measured on generated answers; set training.predict_with_generate: true, or take loss",
        )
    if config.packs and not config.preferring and (training.tokens_per_batch or data.max_length) < data.max_length:
        yield Contradiction(
            ("training.tokens_per_batch", "data.max_length", "data.packing"),
            f"a pack of {training.tokens_per_batch} tokens may not hold an example of up to data.max_length "
            f"({data.max_length}); raise the one or lower the other",
        )
    for idle in without_effect(config):
        section, name = idle.keys[0].split(".")
        part = getattr(config, section)
        if getattr(part, name) != type(part).model_fields[name].default:
            yield idle


def _streaming_alone(config: RunSections) -> Iterator[Contradiction]:
    """What needs to know all rows, which a stream does not."""
    if config.training.max_steps < 1:
        yield Contradiction(
            ("training.max_steps", "data.streaming"), "a stream does not say how long it is; set the number of steps"
        )
    if isinstance(config.data.eval, float):
        yield Contradiction(
            ("data.eval", "data.streaming"), "a share cannot be set aside from a stream; name the evaluation rows"
        )
    if config.data.max_train_rows is not None:
        yield Contradiction(("data.max_train_rows", "data.streaming"), "training.max_steps says where a stream ends")
    if config.data.too_long == "split":
        yield Contradiction(("data.too_long", "data.streaming"), "rows of a stream are not split; take truncate")
    if getattr(config.adapter, "init_lora_weights", None) == "eva":
        yield Contradiction(
            ("adapter.init_lora_weights", "data.streaming"),
            "eva looks at batches beforehand, and a stream has none yet",
        )


def _selective_alone(config: RunSections) -> Iterator[Contradiction]:
    """What hides a layer's products from recomputation that keeps them."""
    for name in ("torch_compile", "fsdp"):
        if getattr(config.training, name):
            yield Contradiction(
                ("training.gradient_checkpointing", f"training.{name}"),
                f"selective looks at a layer's products one by one, which {name} does not let it; take true",
            )


def _elsewhere_alone(config: RunSections) -> Iterator[Contradiction]:
    """What needs the base's weights where sharding or offloading does not leave them."""
    method, training = config.adapter.method, config.training
    if training.fsdp and method in ("full", "bias"):
        yield Contradiction(
            ("training.fsdp", "adapter.method"),
            f"what is sharded is a frozen base, and {method} trains it; take an adapter, or leave fsdp out",
        )
    if training.offload == "none":
        return
    if method in ("full", "bias"):
        yield Contradiction(
            ("training.offload", "adapter.method"),
            f"what comes and goes is a frozen base, and {method} trains it; take an adapter, or leave offload out",
        )
    if config.quantization is not None:
        yield Contradiction(
            ("training.offload", "quantization"), "layers in few bits stay on the device; leave one of them out"
        )
    for name, why in (
        ("fsdp", "shares layers out between processes"),
        ("torch_compile", "compiles layers for weights that stay where they are"),
    ):
        if getattr(training, name):
            yield Contradiction(("training.offload", f"training.{name}"), f"{name} {why}; leave one of them out")
    if training.gradient_checkpointing == "selective":
        yield Contradiction(
            ("training.offload", "training.gradient_checkpointing"),
            "offloaded layers run again as a whole, and selective keeps what their products give; take true",
        )


def without_effect(config: RunSections) -> Iterator[Contradiction]:
    """The keys that change nothing in this run, each with what makes it so."""
    yield from (Contradiction(keys, why) for keys, why in (*idle_for_task(config), *idle_for_objective(config)))
    if config.packs:
        yield Contradiction(
            ("training.per_device_train_batch_size", "data.packing"),
            "sizes padded batches, and data.packing is true; training.tokens_per_batch sizes packs",
        )
    elif not config.tasked:
        yield Contradiction(
            ("training.tokens_per_batch", "data.packing"),
            "sizes packs, and data.packing is false; training.per_device_train_batch_size sizes padded batches",
        )
        yield Contradiction(
            ("data.share_prefixes", "data.packing"),
            "is about packs, and data.packing is false",
        )
    training = config.training
    if not training.load_best_model_at_end and training.early_stopping_patience is None:
        yield Contradiction(
            ("training.metric_for_best_model", "training.load_best_model_at_end"),
            "nothing is judged by it: load_best_model_at_end is false, and early_stopping_patience is not set",
        )
    if training.lr_scheduler_type not in ("cosine_with_min_lr", "warmup_stable_decay"):
        yield Contradiction(
            ("training.min_lr_ratio", "training.lr_scheduler_type"),
            f"{training.lr_scheduler_type} has no lowest learning rate; take cosine_with_min_lr",
        )
    if training.lr_scheduler_type != "warmup_stable_decay":
        yield Contradiction(
            ("training.lr_decay_ratio", "training.lr_scheduler_type"),
            "is about warmup_stable_decay alone",
        )
    if training.loraplus_lr_ratio is None:
        yield Contradiction(
            ("training.loraplus_lr_embedding", "training.loraplus_lr_ratio"), "is about LoRA+; set loraplus_lr_ratio"
        )
    if config.training.tokens_per_step is not None:
        yield Contradiction(
            ("training.gradient_accumulation_steps", "training.tokens_per_step"),
            "counts the batches of a step, and training.tokens_per_step sizes it by tokens; leave one of them out",
        )
    if config.data.eval is None:
        yield Contradiction(("data.max_eval_rows", "data.eval"), "there are no rows to limit: data.eval is not set")
    method = METHODS.get(config.adapter.method)
    for name in () if method is None else method.set_by_run:
        yield Contradiction((f"adapter.{name}", "adapter.method"), "a run counts its own steps; leave it out")
    if config.quantization is not None:
        yield from _idle_quantization(config.quantization)


def _idle_quantization(section: QuantizationSection) -> Iterator[Contradiction]:
    """bitsandbytes has fields of its own; other quantisers have `bits`."""
    own = section.quant_method == DEFAULT
    if own:
        keys = ("quantization.bits", "quantization.quant_method")
        yield Contradiction(keys, f"{DEFAULT} is told by load_in_4bit or load_in_8bit how many to take; leave it out")
    for name in type(section).model_fields:
        if name.startswith(("bnb_", "load_in_")) and not own:
            keys = (f"quantization.{name}", "quantization.quant_method")
            yield Contradiction(keys, f"is about {DEFAULT}, and quant_method is {section.quant_method}; leave it out")
        elif name.startswith("bnb_4bit") and section.load_in_8bit:
            keys = (f"quantization.{name}", "quantization.load_in_8bit")
            yield Contradiction(keys, "is about 4 bits, and load_in_8bit is true")
