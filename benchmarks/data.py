"""How long 100,000 chat rows take to be ready: tokenised, masked, packed, at a first start and at a second.

    python benchmarks/data.py .cache/models/smollm2-135m-instruct --rows 100000

The rows are resampled from examples/data/toolcalls_train.jsonl, each with a mark of its own: none is a duplicate.
Each start is a process of its own, with a cache of its own. Writes benchmarks/results/data-cpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROWS = HERE.parent / "examples" / "data" / "toolcalls_train.jsonl"


def make_rows(path: Path, count: int) -> None:
    """Chats of one to four exchanges."""
    rng = random.Random(0)
    kept = [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = rng.choice(kept)[: 1 + 2 * rng.randint(1, 4)]
            first = {**messages[0], "content": f"{messages[0]['content']}\nSession {number}"}
            file.write(json.dumps({"messages": [first, *messages[1:]]}) + "\n")


def ready(model: str, path: str) -> dict[str, float]:
    """Loads, checks and packs, in this process, as a run does."""
    from lowrank.data import check_supervision, load_examples, plan_batches
    from lowrank.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    began = time.perf_counter()
    examples = load_examples(path, tokenizer, max_length=1024)
    check_supervision(examples, tokenizer)
    plan = plan_batches(examples, packing=True, batch_size=1, max_tokens=2048, pad_token_id=0, seed=0)
    packs = len(plan.epoch(0))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": examples.report.tokens, "packs": packs, "fill": plan.fill()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(ready(options.model, options.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        make_rows(path, options.rows)
        environment = {**os.environ, "LOWRANK_CACHE": folder, "HF_DATASETS_CACHE": f"{folder}/datasets"}
        command = [sys.executable, *sys.argv, "--one", str(path)]
        starts = []
        for _ in range(2):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            starts.append(json.loads(done.stdout.strip().splitlines()[-1]))
    first, second = starts
    text = (
        f"# {options.rows:,} chat rows ready\n\n{platform.machine()}, {os.cpu_count()} cores; "
        + ", ".join(f"{name} {version(name)}" for name in ("datasets", "tokenizers", "transformers"))
        + f". `python {' '.join(sys.argv)}`\n\n| start | seconds |\n|---|---|\n| first | {first['seconds']:.1f} |\n"
        f"| second, from the cache | {second['seconds']:.2f} |\n\n{first['tokens']:,.0f} tokens in {first['packs']:,} "
        f"packs of 2,048, {first['fill']:.1%} full. Bars: 60 s, 2 s, 97 %.\n"
    )
    print(text)
    (HERE / "results" / "data-cpu.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
