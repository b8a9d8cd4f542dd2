"""The rules: from what is known to a config, each value with its reason.

They weigh "LoRA Without Regret" (Schulman 2025: adapters on all linear layers; about ten times the learning rate of
full fine-tuning, whatever the rank, with lora_alpha fixed; small batches; about two bits a parameter are learned) and
"Learning Rate Matters" (2602.04998: variants are within 2 % of one another once the rate is right).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lowrank.errors import InputError
from lowrank.recipes.proposal.base import Base
from lowrank.recipes.proposal.footprint import Way, fits, needed, weights
from lowrank.recipes.proposal.goals import Goal
from lowrank.recipes.proposal.machine import GiB, Machine
from lowrank.recipes.proposal.row_figures import RowFacts

SHORT_ANSWER = 160  # tokens: up to here answers are compared, not only their loss
WORTH_COMPARING = 200  # answers in an evaluation
LEAST_RANK = 8
BITS = 2  # that a parameter of an adapter can hold


class Setting(NamedTuple):
    """One line of a config."""

    section: str
    key: str
    value: Any
    reason: str


def propose(
    base: Base, rows: RowFacts, machine: Machine, *, held_out: str | None, goal: Goal, output: str
) -> list[Setting]:
    """A config for these rows on this base and machine, but for what `paced` adds.

    Args:
        base: What is trained.
        rows: On what.
        machine: Where.
        held_out: The evaluation data; None takes a share of the rows.
        goal: What comes first where two things cannot both be had.
        output: The run's folder.

    Raises:
        InputError: it fits in no way.
    """
    length, told = _max_length(rows, base)
    epochs, why_epochs = _passes(rows)
    r, why_r = _rank(base, rows, epochs, goal)
    step, why_step = _step_tokens(rows, length)
    way, fitting = _choose_way(base, machine, r, length, step, goal, dense=rows.task is not None)
    r, why_r = (r, why_r) if fitting == r else (fitting, f"{r} would not fit")
    return [
        Setting("model", "name_or_path", base.name, f"{base.model_class}, {_millions(base.parameters)} parameters"),
        *_task(rows),
        Setting("model", "dtype", way.dtype, _why_dtype(way, machine)),
        *_quantisation(base, way, r, machine),
        Setting("adapter", "method", "lora", "variants come within 2 % of it once the learning rate is right"),
        Setting("adapter", "r", r, why_r),
        Setting("adapter", "lora_alpha", 32, "with this fixed, the best learning rate does not depend on r"),
        Setting("adapter", "target_modules", "all-linear", _targets(base)),
        *_data(base, rows, held_out, length, told),
        Setting("training", "output_dir", output, "adapter, checkpoints, metrics and report.html go here"),
        *_objective(rows),
        Setting("training", "num_train_epochs", epochs, why_epochs),
        *_batches(base, way, rows, step, why_step),
        Setting("training", "learning_rate", _learning_rate(base, rows), _why_rate(base, rows)),
        *_recompute(base, way, r, machine),
        Setting("training", "save_minutes", 10, "what a crash can cost"),
        *_answers(rows),
    ]


def paced(settings: list[Setting], rows: RowFacts) -> list[Setting]:
    """The settings with what is counted in steps fitted to the steps that they give: how many, and when to evaluate.

    Args:
        settings: As they stand in the config; what is among them stays.
        rows: What is trained on.
    """
    value = {one.key: one.value for one in settings if one.section == "training"}
    if value.get("max_steps", -1) > 0:
        steps = value["max_steps"]
        settings = [one for one in settings if one.key != "num_train_epochs"]
    else:
        steps = math.ceil(rows.count * value["num_train_epochs"] / _rows_in_a_step(value, rows))
        epochs = next(one for one in settings if one.key == "num_train_epochs")
        settings = placed(settings, epochs._replace(reason=f"{epochs.reason}; about {steps:,} steps"))
    looks = [one for one in _looks(steps) if one.key not in value]
    at = next((at for at, one in enumerate(settings) if one.key == "save_minutes"), len(settings))
    return [*settings[:at], *looks, *settings[at:]]


def _rows_in_a_step(training: Mapping[str, Any], rows: RowFacts) -> float:
    processes = training.get("num_processes") or 1
    accumulated = training.get("gradient_accumulation_steps", 1) * processes
    if (tokens := training.get("tokens_per_step") or training.get("tokens_per_batch", 0) * accumulated) > 0:
        return tokens / float(rows.lengths.mean()) / (2 if rows.objective == "dpo" else 1)
    return training["per_device_train_batch_size"] * accumulated


def placed(settings: list[Setting], asked: Setting) -> list[Setting]:
    """The settings with another in its key's place, or at the end of its section."""
    places = [at for at, one in enumerate(settings) if (one.section, one.key) == asked[:2]]
    last = max((at + 1 for at, one in enumerate(settings) if one.section == asked.section), default=len(settings))
    at, end = (places[0], places[0] + 1) if places else (last, last)
    return [*settings[:at], asked, *settings[end:]]


def _max_length(rows: RowFacts, base: Base) -> tuple[int, str]:
    """The longest example that is taken, and what that leaves out."""
    longest, most = int(rows.lengths.max()), int(np.percentile(rows.lengths, 99))
    wanted = longest if longest <= 1.5 * most else most
    length = max(64, math.ceil(wanted / 64) * 64)
    if base.positions is not None and length > base.positions:
        length = base.positions
    over = int((rows.lengths > length).sum())
    among = f"{len(rows.lengths):,}{' rows that were looked at' if rows.sampled else ' rows'}"
    if not over:
        return length, f"all of {among} fit; the longest has {longest:,} tokens"
    what = "would be cut into several" if rows.text else "are longer and left out"
    return length, f"{1 - over / len(rows.lengths):.1%} of {among} fit; {over:,} {what} (the longest: {longest:,})"


def _passes(rows: RowFacts) -> tuple[int, str]:
    """How often the rows are gone through."""
    count = f"{rows.count:,} rows"
    if rows.objective:
        return 1, f"{count}, each seen once: preferences are soon learned by heart"
    if rows.text:
        return 1, "text seen twice is learned by heart"
    if rows.count >= 20_000:
        return 1, f"{count} are enough to see each once"
    return (
        (2, f"{count}, each seen twice") if rows.count >= 2_000 else (3, f"{count} are few, each is seen three times")
    )


def _rank(base: Base, rows: RowFacts, epochs: int, goal: Goal) -> tuple[int, str]:
    """The least of 16, 32, 64, 128 that holds what the rows can teach; 8 where memory comes first."""
    taught = rows.count * float(rows.supervised.mean())
    least = LEAST_RANK if goal == "memory" else 16
    r = next((r for r in (least, 16, 32, 64, 128) if r * base.per_rank * BITS >= taught), 128)
    return r, (
        f"{_millions(r * base.per_rank)} values hold about {_millions(r * base.per_rank * BITS)} bits; the rows have "
        f"{_millions(taught)} supervised tokens, of about a bit each"
    )


def _step_tokens(rows: RowFacts, length: int) -> tuple[int, str]:
    """Tokens in an optimiser step: small batches, at least some hundred steps."""
    together = int(min(16, max(4, rows.count // 100)))
    mean = float(rows.lengths.clip(max=length).mean())
    tokens = max(length, math.ceil(together * mean / 64) * 64)
    return tokens, f"about {tokens / mean:.0f} rows in a step; adapters learn best from small ones"


def _task(rows: RowFacts) -> list[Setting]:
    """What is learned, where it is not the next token."""
    return [Setting("model", "task", rows.task, "what the rows' keys say")] if rows.task else []


def _choose_way(
    base: Base, machine: Machine, r: int, length: int, step: int, goal: Goal, *, dense: bool = False
) -> tuple[Way, int]:
    """The first way that fits, and its rank.

    Raises:
        InputError: none does.
    """
    ways = [way for way in _ways(machine, length, step, goal) if not (dense and way.four_bits)]
    for way, ranks in [*((way, r) for way in ways), (ways[-1], min(r, LEAST_RANK))]:
        if fits(base, way, ranks, machine):
            return way, ranks
    held = "as it is" if dense else "in 4 bits"
    raise InputError(
        f"{base.name} does not fit: {held} its weights take {weights(base, ways[-1]) / GiB:.1f} GiB, a run about "
        f"{needed(base, ways[-1], LEAST_RANK) / GiB:.1f}, and {machine} leave room for {machine.room / GiB:.1f}",
        fix="Take a smaller base or shorter rows; several cards share a base under training.fsdp.",
    )


def _ways(machine: Machine, length: int, step: int, goal: Goal) -> Iterable[Way]:
    """From the most comfortable to the smallest."""
    dtypes = ["bfloat16"] if machine.bfloat16 >= 1 or machine.card is not None else ["float32", "bfloat16"]
    for four_bits in (False, True):
        for dtype in dtypes[-1:] if four_bits or goal == "memory" else dtypes:
            computed = "float32" if machine.computes_wide else dtype
            if goal != "memory":
                yield Way(dtype, computed, four_bits, False, max(step, length))
                yield Way(dtype, computed, four_bits, False, length)
            if goal == "speed":
                yield Way(dtype, computed, four_bits, True, max(step, length))
            yield Way(dtype, computed, four_bits, True, length)


def _without(base: Base, way: Way, r: int, machine: Machine) -> str:
    return (
        f"{needed(base, way, r) / GiB:.1f} GiB would be needed without, and there is room for {machine.room / GiB:.1f}"
    )


def _why_dtype(way: Way, machine: Machine) -> str:
    """What speaks for the dtype on this machine."""
    faster = machine.bfloat16 if way.dtype == "bfloat16" else 1 / machine.bfloat16
    other = "float32" if way.dtype == "bfloat16" else "bfloat16"
    if faster >= 1.05:
        return f"products are {faster:.1f} times as fast here as in {other}"
    return "half of float32's memory" if way.dtype == "bfloat16" else "no slower here than bfloat16"


def _learning_rate(base: Base, rows: RowFacts) -> float:
    """5e-4 at a width of 2,000, less for wider bases, to two digits; for preferences a tenth of it."""
    rate = 5e-4 * math.sqrt(2000 / base.hidden)
    return float(f"{rate / 10 if rows.objective else rate:.1e}")


def _why_rate(base: Base, rows: RowFacts) -> str:
    if rows.objective:
        return "a tenth of what answers are learned with: telling them apart takes little, and too much spoils them"
    return f"ten times full fine-tuning's for states {base.hidden:,} wide (5e-4 at 2,000, by the root of the width)"


def _objective(rows: RowFacts) -> list[Setting]:
    """What is learned of preferences."""
    if rows.objective is None:
        return []
    why = {"dpo": "each row has a better and a worse answer", "kto": "each row says whether its answer is wanted"}
    return [
        Setting("training", "objective", rows.objective, why[rows.objective]),
        Setting("training", "beta", 0.1, "how strongly answers are held to the base's; the papers' own"),
    ]


def _targets(base: Base) -> str:
    experts = f"; its {base.experts} experts stay as they are (target_parameters adapts them)" if base.experts else ""
    return f"all layers, not attention's alone: {base.linear / base.parameters:.0%} of the weights{experts}"


def _quantisation(base: Base, way: Way, r: int, machine: Machine) -> list[Setting]:
    if not way.four_bits:
        return []
    why = _without(base, replace(way, four_bits=False, recompute=True), r, machine)
    return [
        Setting("quantization", "load_in_4bit", True, f"the base does not fit otherwise: {why}"),
        Setting("quantization", "bnb_4bit_quant_type", "nf4", "sixteen values spread as weights are"),
        Setting("quantization", "bnb_4bit_use_double_quant", True, "0.4 bits a weight less"),
    ]


def _data(base: Base, rows: RowFacts, held_out: str | None, length: int, told: str) -> list[Setting]:
    repeats = f", {rows.duplicates:,} of them repeats" if rows.duplicates else ""
    sampled = f", {len(rows.lengths):,} looked at" if rows.sampled else ""
    if rows.task:
        return [
            Setting("data", "train", rows.path, f"{rows.count:,} rows for {rows.task}{sampled}{repeats}"),
            _held_out(rows, held_out),
            Setting("data", "max_length", length, told.replace("left out", "cut")),
            Setting("data", "too_long", "truncate", "of what is longer the beginning is read"),
        ]
    return [
        Setting("data", "train", rows.path, f"{rows.count:,} rows of the format {rows.format}{sampled}{repeats}"),
        _held_out(rows, held_out),
        *([_template(rows)] if rows.template else []),
        Setting("data", "max_length", length, told),
        *([Setting("data", "too_long", "split" if rows.text else "drop", "what is longer does not end the run")]
          if (rows.lengths > length).any() or rows.sampled else []),
        *_train_on(rows),
        Setting("data", "packing", base.packs, "examples share a row without padding, and do not see one another")
        if base.packs
        else Setting("data", "packing", False, f"the layers of {base.model_class} would mix examples that share a row"),
    ]  # fmt: skip


def _train_on(rows: RowFacts) -> list[Setting]:
    if rows.objective:
        return []
    if rows.text:
        return [Setting("data", "train_on", "all", "plain text: every token is learned")]
    return [Setting("data", "train_on", "assistant", "only the answers carry loss")]


def _template(rows: RowFacts) -> Setting:
    return Setting("data", "chat_template", rows.template, "the tokenizer has none, and the rows are conversations")


def _held_out(rows: RowFacts, given: str | None) -> Setting:
    if given is not None:
        return Setting("data", "eval", given, "as given")
    share = float(f"{min(0.25, max(20, min(500, rows.count * 0.05)) / rows.count):.2g}")
    return Setting(
        "data", "eval", share, f"no evaluation rows were given: about {share * rows.count:.0f} are set aside"
    )


def _batches(base: Base, way: Way, rows: RowFacts, step: int, why: str) -> list[Setting]:
    if rows.task or not base.packs:
        size = max(1, int(way.tokens // np.percentile(rows.lengths, 99)))
        accumulate = max(1, round(step / (size * float(rows.lengths.mean()))))
        return [
            Setting("training", "per_device_train_batch_size", size, "rows of like length are padded together"),
            Setting("training", "gradient_accumulation_steps", accumulate, why),
        ]
    if rows.objective:
        room = max(way.tokens, 2 * int(rows.lengths.max()))
        told = "holds both answers to the longest prompt, which is computed once"
        packs = max(1, round(2 * step / room))
        accumulate = [Setting("training", "gradient_accumulation_steps", packs, why)] if packs > 1 else []
        return [Setting("training", "tokens_per_batch", room, told), *accumulate]
    settings = [Setting("training", "tokens_per_batch", way.tokens, why if way.tokens >= step else "what fits at once")]
    if way.tokens < step:
        settings.append(Setting("training", "tokens_per_step", step, why))
    return settings


def _recompute(base: Base, way: Way, r: int, machine: Machine) -> list[Setting]:
    if not way.recompute:
        return []
    without = replace(way, recompute=False)
    why = "memory comes first" if fits(base, without, r, machine) else _without(base, without, r, machine)
    return [Setting("training", "gradient_checkpointing", True, f"a third slower, but less memory: {why}")]


def _looks(steps: int) -> list[Setting]:
    every = max(10, 10 * round(steps / 50))
    if steps < 2 * every:
        return []
    return [
        Setting("training", "eval_steps", every, "five looks at the loss on the way"),
        Setting("training", "load_best_model_at_end", True, "keeps the weights of the best of them"),
    ]


def _answers(rows: RowFacts) -> list[Setting]:
    longest = int(np.percentile(rows.supervised, 99))
    if rows.text or rows.task or rows.objective or longest > SHORT_ANSWER:
        return []
    compared = "json" if rows.json else "text"
    return [
        Setting("training", "predict_with_generate", True, f"answers are short (99 % within {longest} tokens)"),
        Setting("training", "exact_match", compared, "the same JSON value" if rows.json else "the same text"),
        Setting("training", "generation_max_new_tokens", math.ceil((longest + 8) / 16) * 16, "room for the longest"),
    ]


def _millions(count: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f}"
