"""Make the rows of the second task of examples/claims: who is who in a family, answered in one word.

    pip install -c constraints.txt -e ".[claims]"
    python examples/make_kinship.py    # kinship_train.jsonl and kinship_eval.jsonl in examples/data

The families are those of the package reasoning-gym (its generator `family_relationships`), which also knows the right
answer. The same seed gives the same files, byte for byte, and no question of the eval split is in the train split.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import reasoning_gym

DATA = Path(__file__).parent / "data"
ROWS = {"train": 2000, "eval": 200}
SEEDS = {"train": 1, "eval": 2}


def families(split: str) -> dict[str, str]:
    """Question -> answer, each question once."""
    entries = reasoning_gym.create_dataset("family_relationships", size=2 * ROWS[split], seed=SEEDS[split])
    return {entry["question"]: entry["answer"] for entry in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the kinship task's train and eval rows.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: examples/data)")
    options = parser.parse_args()
    used: set[str] = set()
    for split in ("eval", "train"):
        rows = {question: answer for question, answer in families(split).items() if question not in used}
        used |= set(rows)
        path = options.out / f"kinship_{split}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for question, answer in list(rows.items())[: ROWS[split]]:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
        print(f"{path}: {min(len(rows), ROWS[split])} rows")


if __name__ == "__main__":
    main()
