"""Make the configs of configs/, all but quickstart's: what `lowrank init` would write for each situation.

    python examples/make_configs.py    # needs no model and no rows: sizes and lengths are stated here

What a situation asks for beyond init's rules (another method, long documents, several cards) stands in its config with
its reason, as after `lowrank init --set`.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from transformers import LlamaConfig, ModernBertConfig, PreTrainedConfig, Qwen3Config

from lowrank.recipes.proposal.base import sizes
from lowrank.recipes.proposal.machine import GiB, Machine
from lowrank.recipes.proposal.page import as_yaml
from lowrank.recipes.proposal.row_figures import SAMPLE, RowFacts
from lowrank.recipes.proposal.rules import Setting, paced, placed, propose

CONFIGS = Path(__file__).parent.parent / "configs"
LLAMA_3: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
SMOLLM2 = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, vocab_size=49152,
    max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
BASES: dict[str, PreTrainedConfig] = {
    "HuggingFaceTB/SmolLM2-1.7B": SMOLLM2,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2,
    "Qwen/Qwen3-4B-Instruct-2507": Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=262144, tie_word_embeddings=True,
    ),
    "answerdotai/ModernBERT-base": ModernBertConfig(),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA_3
    ),
    "meta-llama/Llama-3.3-70B-Instruct": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA_3
    ),
}  # fmt: skip


def card(name: str, memory: int, count: int = 1) -> Machine:
    """A machine with cards of so many GiB, each as good as empty."""
    return Machine(256 * GiB, 32, count, int(0.985 * memory * GiB), name, bfloat16=2.0)


SMALL, MIDDLE, LARGE = card("RTX 4080", 16), card("RTX 4090", 24), card("H100", 80)


def rows(path: str, count: int, tokens: int, longest: int, kind: str = "messages") -> RowFacts:
    """Rows whose lengths spread as those of written text do: many near the median, few very long ones."""
    spread = NormalDist(log(tokens), 0.6).inv_cdf
    looked_at = min(count, SAMPLE)
    lengths = np.array([int(min(exp(spread((at + 0.5) / looked_at)), longest)) for at in range(looked_at)])
    return RowFacts(path, count, kind, lengths, lengths if kind == "text" else lengths * 2 // 3)


def labelled(path: str, count: int, tokens: int, longest: int, task: str) -> RowFacts:
    """Rows of a task, with one label each."""
    lengths = rows(path, count, tokens, longest).lengths
    return RowFacts(path, count, task, lengths, np.ones_like(lengths), task=task)


def judged(path: str, count: int, tokens: int, longest: int, objective: str) -> RowFacts:
    """Rows of preferences."""
    known = rows(path, count, tokens, longest)
    return replace(known, format="preference" if objective == "dpo" else "prompt_completion", objective=objective)


CHATS = rows("data/train.jsonl", 10_000, 400, 2048)


class Situation(NamedTuple):
    """What a config is written for.

    Attributes:
        head: Lines on what it is and how it is run.
        base: A key of `BASES`.
        rows: What it is trained on.
        machine: Where.
        asked: What it asks for beyond the rules.
        left_out: Keys of the rules that do not belong to what is asked for.
        held_out: The evaluation rows; None takes a share.
    """

    head: str
    base: str
    rows: RowFacts
    machine: Machine
    asked: tuple[Setting, ...] = ()
    left_out: tuple[str, ...] = ()
    held_out: str | None = "data/eval.jsonl"


def preferred(name: str, what: str, *asked: Setting, kind: str = "dpo") -> Situation:
    """A config for one objective of those that learn from preferences."""
    keys = '{"prompt": ..., "chosen": ..., "rejected": ...}'
    keys = keys if kind == "dpo" else '{"prompt": ..., "completion": ..., "label": true or false}'
    head = f"""{what} Rows are {keys}.

  lowrank train configs/{name}.yaml

To go on from an adapter that has learned answers, name its folder under model.adapter, in place of all of adapter."""
    base = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    named = () if name == kind else (Setting("training", "objective", name, "what tells answers apart"),)
    return Situation(head, base, judged("data/train.jsonl", 10_000, 400, 1024, kind), MIDDLE, (*named, *asked))


SITUATIONS = {
    "lora": Situation(
        """LoRA on a chat data set.

  lowrank train configs/lora.yaml
  lowrank train configs/lora.yaml --set training.learning_rate=1e-4""",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        CHATS,
        MIDDLE,
    ),
    "qlora": Situation(
        """QLoRA: a LoRA over a base held in four bits. An 8B model fits on a card of 16 GB.

  pip install 'lowrank[quantization]'
  lowrank train configs/qlora.yaml""",
        "meta-llama/Llama-3.1-8B-Instruct",
        CHATS,
        SMALL,
    ),
    "dora": Situation(
        """DoRA: magnitude and direction of each weight train apart. A step costs more than with LoRA.

  lowrank train configs/dora.yaml""",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        CHATS,
        MIDDLE,
        (Setting("adapter", "method", "dora", "each row's length trains apart from its direction"),),
    ),
    "adalora": Situation(
        """AdaLoRA: ranks start at init_r, and shrink to target_r on average where they matter least.

  lowrank train configs/adalora.yaml""",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        CHATS,
        MIDDLE,
        (
            Setting("adapter", "method", "adalora", "each module gets the rank that it turns out to need"),
            Setting("adapter", "init_r", 24, "the rank of every module at the start: half as much again as at the end"),
            Setting("adapter", "target_r", 16, "the average rank at the end: what the rules give LoRA here"),
            Setting("adapter", "tinit", 100, "steps before the first cut: importance is known by then"),
            Setting("adapter", "tfinal", 400, "steps after the last one: what is left settles"),
            Setting("adapter", "deltaT", 10, "steps between two cuts"),
            Setting("adapter", "orth_reg_weight", 0.5, "keeps P and Q orthogonal"),
            Setting("training", "learning_rate", 1e-3, "higher than LoRA's: the singular values start at zero"),
        ),
        left_out=("adapter.r",),
    ),
    "many_tasks": Situation(
        """One of many small tasks over one base: small adapters, each trained in minutes, all served together.

  for task in invoices letters orders; do
    lowrank train configs/many_tasks.yaml \\
      --set data.train=data/$task.jsonl --set training.output_dir=runs/tasks/$task
  done

  lowrank train configs/many_tasks.yaml

In Python, `lowrank.load` puts them all on one model, and `routed` answers a batch whose rows take different ones.""",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        rows("data/invoices.jsonl", 400, 250, 1024),
        MIDDLE,
        (
            Setting("adapter", "r", 8, "the same for all: routed batches are fastest so"),
            Setting("adapter", "target_modules", ["q_proj", "v_proj", "down_proj"], "small files, for there are many"),
            Setting("training", "output_dir", "runs/tasks/invoices", "one folder for each task"),
            Setting("training", "num_train_epochs", 5, "at most: it stops where the evaluation no longer improves"),
            Setting("training", "eval_steps", 30, "often, so that it stops in time"),
            Setting("training", "early_stopping_patience", 3, "evaluations without a better one"),
        ),
        held_out=None,
    ),
    "long_context": Situation(
        """Long documents: memory grows linearly with their length, not with its square.

  lowrank train configs/long_context.yaml""",
        "Qwen/Qwen3-4B-Instruct-2507",
        rows("data/long.jsonl", 3_000, 12_000, 32_768),
        LARGE,
        (
            Setting("model", "attention", "auto", "never the n x n scores"),
            Setting("data", "too_long", "truncate", "one that is longer is cut, counted, and keeps supervised tokens"),
            Setting(
                "training", "gradient_checkpointing", "offload",
                "layers' inputs go to the host's memory; true keeps them on the card",
            ),
        ),
        held_out=None,
    ),
    "continued_pretraining": Situation(
        """More of the same language: plain text of a field, every token supervised, embeddings and head trained too.

  lowrank train configs/continued_pretraining.yaml

For more text than fits on the disk: --set data.streaming=true --set training.max_steps=10000""",
        "HuggingFaceTB/SmolLM2-1.7B",
        rows("data/corpus", 50_000, 1_500, 8192, kind="text"),
        LARGE,
        (
            Setting("adapter", "r", 64, "a field is more than the least that holds a task"),
            Setting("adapter", "lora_alpha", 64, "with use_rslora: scaled by lora_alpha / sqrt(r)"),
            Setting("adapter", "use_rslora", True, "for high ranks"),
            Setting("adapter", "modules_to_save", ["embed_tokens"], "new words need it; a tied head trains with it"),
            Setting("data", "too_long", "split", "long texts become several examples: nothing of them is lost"),
            Setting("training", "learning_rate", 1e-4, "scaled by 8 under use_rslora; text must not undo the base"),
            Setting("training", "lr_scheduler_type", "warmup_stable_decay", "more text can follow where it is stable"),
            Setting("training", "lr_decay_ratio", 0.2, "the share of the steps that it falls in"),
            Setting("training", "min_lr_ratio", 0.1, "where it ends"),
            Setting("training", "warmup_ratio", 0.02, "the optimiser's averages form"),
            Setting("training", "weight_decay", 0.01, "little: the base is frozen"),
            Setting(
                "training", "parameter_groups", [{"pattern": "embed_tokens", "learning_rate": 1e-5}],
                "what was pretrained moves less than what is new",
            ),
        ),
        held_out=None,
    ),
    "classification": Situation(
        """A label for a text: rows are {"text": ..., "label": ...}, with "text_pair" where it is about two texts.

  pip install 'lowrank[metrics]'
  lowrank train configs/classification.yaml
  lowrank predict runs/classification --text "..." """.strip(),
        "answerdotai/ModernBERT-base",
        labelled("data/train.jsonl", 10_000, 200, 512, "sequence_classification"),
        SMALL,
        (
            Setting("training", "class_weights", "balanced", "rare labels weigh as much as they are rare"),
            Setting("training", "metric_for_best_model", "f1", "macro F1; accuracy and mcc are measured too"),
        ),
    ),
    "token_classification": Situation(
        """A tag for each word: rows are {"tokens": ["Anna", ...], "tags": ["B-PER", ...]}.

  pip install 'lowrank[metrics]'
  lowrank train configs/token_classification.yaml
  lowrank predict runs/token-classification --text "..." """.strip(),
        "answerdotai/ModernBERT-base",
        labelled("data/train.jsonl", 10_000, 30, 256, "token_classification"),
        SMALL,
        (Setting("training", "metric_for_best_model", "f1", "of whole entities, by seqeval"),),
    ),
    "embedding": Situation(
        """Texts that belong together lie near one another: rows are {"anchor": ..., "positive": ...}.

  lowrank train configs/embedding.yaml
  lowrank predict runs/embedding --file texts.jsonl --out vectors.jsonl""",
        "answerdotai/ModernBERT-base",
        labelled("data/train.jsonl", 10_000, 40, 256, "embedding"),
        SMALL,
        (
            Setting("training", "per_device_train_batch_size", 64, "a pair is told from the others of its batch"),
            Setting("training", "gradient_accumulation_steps", 1, "steps of several batches tell no more apart"),
            Setting("training", "metric_for_best_model", "ndcg@10", "of each anchor's own positive among all"),
        ),
    ),
    "dpo": preferred("dpo", "DPO: the better answer is to gain on the base more than the worse one."),
    "ipo": preferred("ipo", "IPO: DPO whose gain is bounded, for pairs that are easily told apart."),
    "simpo": preferred(
        "simpo",
        "SimPO: the better answer's tokens are to be likelier, with no reference.",
        Setting("training", "beta", 2.0, "of mean log-probabilities; the paper's"),
        Setting("training", "simpo_gamma", 0.5, "by how much; from 0.3 to 1.6 in the paper"),
    ),
    "cpo": preferred(
        "cpo",
        "CPO: DPO without a reference, held by the chosen answer's own loss.",
        Setting("training", "cpo_alpha", 1.0, "weight of that loss"),
    ),
    "orpo": preferred(
        "orpo",
        "ORPO: answers are learned and told apart at once, from a base that has not been tuned.",
        Setting("training", "beta", 0.1, "weight of telling apart beside learning; the paper's"),
    ),
    "kto": preferred(
        "kto",
        "KTO: answers that are wanted and others that are not, without pairs.",
        Setting("training", "desirable_weight", 1.0, "n, where unwanted answers are n times as many"),
        kind="kto",
    ),
    "fsdp": Situation(
        """A 70B model on a machine with eight cards: the frozen base is sharded, adapters are whole on each.

  torchrun --nproc_per_node 8 -m lowrank train configs/fsdp.yaml
  lowrank train configs/fsdp.yaml --set training.num_processes=1     (where one card is enough)

One card that is too small: --set training.num_processes=1 --set training.fsdp=false --set training.offload=layers""",
        "meta-llama/Llama-3.3-70B-Instruct",
        CHATS,
        card("eight H100 as one", 8 * 80),
        (
            Setting("training", "num_processes", 8, "refused where another number was launched"),
            Setting("training", "fsdp", True, "FSDP2: each card holds an eighth of the base"),
            Setting("training", "num_train_epochs", 2, "10,000 rows, each seen twice"),
            Setting("training", "tokens_per_batch", 2048, "on each card: the longest row, or several short ones"),
            Setting("training", "tokens_per_step", 16_384, "over all cards: one batch of each keeps them busy"),
            Setting("training", "gradient_checkpointing", True, "a card has no room for 80 layers' activations"),
        ),
    ),
}  # fmt: skip


def text_of(name: str) -> str:
    """The config of a situation."""
    situation = SITUATIONS[name]
    settings = propose(
        sizes(situation.base, BASES[situation.base], task=situation.rows.task),
        situation.rows,
        situation.machine,
        held_out=situation.held_out,
        goal="quality",
        output=f"runs/{name.replace('_', '-')}",
    )
    settings = [one for one in settings if f"{one.section}.{one.key}" not in situation.left_out]
    for setting in situation.asked:
        settings = placed(settings, setting)
    settings = paced(settings, situation.rows)
    made_by = [f"What lowrank init writes for {situation.machine}; made by examples/make_configs.py.", ""]
    first, *others = situation.head.splitlines()
    return as_yaml(settings, ["yaml-language-server: $schema=schema.json", first, *made_by, *others[1:]])


def main() -> None:
    for name in SITUATIONS:
        (CONFIGS / f"{name}.yaml").write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
