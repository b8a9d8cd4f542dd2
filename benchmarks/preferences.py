"""DPO beside TRL: pairs a second and memory, where long prompts have two short answers.

    python benchmarks/preferences.py                 # CPU, float32, one thread; about ten minutes

Rows of 1,000 random tokens and two answers of 100, over random bases of SmolLM2's shapes cut to four layers, with its
vocabulary and with one of 262,144 tokens; LoRA of rank 16 on all linear layers, three epochs, two pairs in a batch,
every answer compared with the base. Each side runs in a process of its own, in turn: seconds of the run from its first
row to its last step (the reference's answers are among them) and the most memory that the process held. TRL runs as it
comes, and with its reference asked beforehand. Writes benchmarks/results/preferences-cpu.md.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from meter import machine
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).parent
PROMPT, ANSWER, EPOCHS, TOGETHER = 1000, 100, 3, 2
VOCABULARIES = (49_152, 262_144)
SIDES = ("lowrank", "trl", "trl, reference beforehand")
WORDS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side is not None:
        print(json.dumps(_run(options.side, options.folder)))
        return
    lines = [
        f"# DPO beside TRL, {machine(torch.device('cpu'))}\n",
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}; "
        f"`python {' '.join(sys.argv)}`. {options.pairs} pairs of {PROMPT} + 2 x {ANSWER} tokens, {EPOCHS} epochs; "
        f"medians of {options.repeats} in turn (least and most in brackets).\n",
        "| vocabulary | side | pairs a second | against TRL | most memory, MiB | of TRL's |",
        "|---" * 6 + "|",
    ]
    for vocabulary in VOCABULARIES:
        lines += _rows(vocabulary, options.pairs, options.repeats)
        print("\n".join(lines), flush=True)
        (HERE / "results" / "preferences-cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rows(vocabulary: int, pairs: int, repeats: int) -> list[str]:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, vocabulary, pairs)
        for _ in range(repeats):
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--folder", name]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[side].append(json.loads(said.splitlines()[-1]))
    speeds = {side: [pairs * EPOCHS / one["seconds"] for one in runs] for side, runs in found.items()}
    memory = {side: statistics.median(one["peak"] for one in runs) / 2**20 for side, runs in found.items()}
    theirs = statistics.median(speeds["trl"])
    return [
        f"| {vocabulary:,} | {side} | {statistics.median(speed):.3f} ({min(speed):.3f} to {max(speed):.3f}) | "
        f"{statistics.median(speed) / theirs:.2f} | {memory[side]:,.0f} | {memory[side] / memory['trl']:.2f} |"
        for side, speed in speeds.items()
    ]


def _prepare(folder: Path, vocabulary: int, pairs: int) -> None:
    """A random base with a tokenizer of one token a word, and rows."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    words = {"<pad>": 0, "<eos>": 1, **{f"w{at}": at + 2 for at in range(WORDS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(0)

    def text(count: int) -> str:
        return "".join(f" w{draw.randrange(WORDS)}" for _ in range(count))

    rows = [{"prompt": text(PROMPT), "chosen": text(ANSWER - 1), "rejected": text(ANSWER - 1)} for _ in range(pairs)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run(side: str, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        seconds = _ours(folder, Path(name)) if side == "lowrank" else _theirs(folder, Path(name), "beforehand" in side)
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _ours(folder: Path, output: Path) -> float:
    import os

    import lowrank

    os.environ["LOWRANK_CACHE"] = str(output / "cache")  # nothing is known from before
    began = time.perf_counter()
    lowrank.train(
        {
            "model": {"name_or_path": str(folder / "base"), "dtype": "float32"},
            "adapter": {"r": 16, "lora_alpha": 32},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": 2048},
            "training": {
                "output_dir": str(output / "out"), "objective": "dpo", "num_train_epochs": EPOCHS,
                "tokens_per_batch": TOGETHER * (PROMPT + 2 * ANSWER), "learning_rate": 1e-4, "report_to": "none",
            },
        }
    )  # fmt: skip
    return time.perf_counter() - began


def _theirs(folder: Path, output: Path, beforehand: bool) -> float:
    import datasets
    import peft

    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    began = time.perf_counter()
    args = trl.DPOConfig(
        output_dir=str(output), per_device_train_batch_size=TOGETHER, num_train_epochs=EPOCHS, max_length=2048,
        learning_rate=1e-4, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, precompute_ref_log_probs=beforehand,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
