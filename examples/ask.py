"""Ask a model folder one question with plain transformers, to see that the folder needs nothing else.

    python examples/ask.py runs/quickstart-merged "Wake me at 6:40 am for rowing" \\
        --system-of examples/data/toolcalls_eval.jsonl

`--system-of` takes the system prompt of the first row of a chat file, so that the model is asked as it was trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import transformers


def ask(folder: Path, question: str, system: str | None = None) -> str:
    """The greedy answer of the chat model in `folder` to one question."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "system", "content": system}] if system else []
    prompt = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=100)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def system_of(rows: Path) -> str:
    """The system prompt of the first row of a JSONL file of chats."""
    with rows.open(encoding="utf-8") as lines:
        first = json.loads(next(lines))["messages"][0]
    if first["role"] != "system":
        raise SystemExit(f"error: {rows}: the first row does not start with a system message")
    return first["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model folder one question with plain transformers.")
    parser.add_argument("model", type=Path, help="a folder that from_pretrained reads")
    parser.add_argument("question")
    parser.add_argument("--system-of", type=Path, metavar="FILE", help="take the system prompt of a chat file")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    system = system_of(options.system_of) if options.system_of else None
    print(ask(options.model, options.question, system))


if __name__ == "__main__":
    main()
