"""Preferences by a rule that anybody can check: of two right answers the shorter one is the better one.

    python examples/preferences/make_pairs.py    # writes runs/preferences/: sft.jsonl, pairs.jsonl, pairs_eval.jsonl

The rows are the tool calls of examples/data. For fine-tuning, half of the answers are written over several lines and
half in one, at random: a model that has learned them knows both ways. A pair has the same call both ways.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "data"
OUT = Path("runs/preferences")
LEARNED, JUDGED = 600, 200


def rows_of(name: str) -> list[dict[str, Any]]:
    """The tool calls of a file."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def long(answer: str) -> str:
    """The same call over several lines."""
    return json.dumps(json.loads(answer), indent=2, ensure_ascii=False)


def pair_of(row: dict[str, Any]) -> dict[str, Any]:
    """The call in one line, which is to be chosen, and over several."""
    *prompt, answer = row["messages"]
    return {"prompt": prompt, "chosen": [answer], "rejected": [{**answer, "content": long(answer["content"])}]}


def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """A file of rows."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (OUT / name).write_text(text, encoding="utf-8")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    train, draw = rows_of("toolcalls_train.jsonl"), random.Random(0)
    either = [
        {"messages": [*pair["prompt"], *pair[draw.choice(["chosen", "rejected"])]]}
        for pair in map(pair_of, train[:LEARNED])
    ]
    write("sft.jsonl", either)
    write("pairs.jsonl", map(pair_of, train[LEARNED : LEARNED + JUDGED]))
    write("pairs_eval.jsonl", map(pair_of, rows_of("toolcalls_eval.jsonl")))
    print(f"wrote {OUT}: {LEARNED} answers to learn, {JUDGED} pairs, and those to judge by")


if __name__ == "__main__":
    main()
