"""Whether base + adapter and the merged model give the same greedy answers, in bfloat16 and in float32.

    python benchmarks/same_answers.py runs/quickstart runs/quickstart-merged

Two models that are the same function in exact arithmetic differ where two tokens are almost equally likely. In float32
that hardly happens; so a difference there is the merge's, and one that only bfloat16 shows is the arithmetic's.
"""

from __future__ import annotations

import itertools
import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import lowrank
from lowrank.attention import set_attention
from lowrank.config import load_config
from lowrank.models import load_model, load_tokenizer
from lowrank.training.evaluation.answers import answer_all
from lowrank.training.evaluation.comparisons import same_json
from lowrank.training.machine.memory import freed_blocks_kept


def main() -> None:
    """Answers every evaluation row four times and prints how many answers differ."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a run's folder: adapter and config")
    parser.add_argument("merged", help="the merged model's folder")
    options = parser.parse_args()
    config = load_config(Path(options.run) / "config.yaml")
    rows = [json.loads(line)["messages"] for line in Path(str(config.data.eval)).read_text().splitlines()]
    expected = [row[-1]["content"] for row in rows]
    tokenizer: Any = load_tokenizer(options.merged)
    chats = [tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=False) for row in rows]
    answers = {}
    for folder, dtype in itertools.product((options.run, options.merged), ("bfloat16", "float32")):
        model = load_model(config.model.name_or_path if folder == options.run else folder, dtype=dtype)
        if folder == options.run:
            lowrank.load(model, folder)
        set_attention(model, "auto")
        with freed_blocks_kept(False):
            answers[folder, dtype] = answer_all(
                model, tokenizer, chats, max_new_tokens=config.training.generation_max_new_tokens, batch_size=40
            )
    print(f"{len(rows)} rows of {config.data.eval}")
    for (folder, dtype), given in answers.items():
        print(f"{folder} in {dtype}: {sum(map(same_json, given, expected))} right")
    for (one, first), (other, second) in itertools.combinations(answers.items(), 2):
        differing = sum(a != b for a, b in zip(first, second, strict=True))
        print(f"{' in '.join(one)} and {' in '.join(other)}: {differing} answers differ")


if __name__ == "__main__":
    main()
