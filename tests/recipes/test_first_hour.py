"""The first hour: from a file to an answer and to a merged model in four commands, without a word of YAML."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

BASE = Path(__file__).parents[2] / ".cache" / "models" / "smollm2-135m-instruct"
DRAW = random.Random(0)


def words(least: int, most: int) -> str:
    return " ".join(DRAW.choices(["red", "house", "seven", "walks", "under", "light"], k=DRAW.randint(least, most)))


def chats(path: Path) -> None:
    """500 conversations, some of several turns."""
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]
    rows = [
        [{"role": "user", "content": words(2, 6)}, {"role": "assistant", "content": words(4, 12)}, *turns * (n % 2)]
        for n in range(500)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def table(path: Path) -> None:
    """Questions and answers as a spreadsheet saves them."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer"])
        rows.writerows([f'what is {n}, or "{n}", and one?', n + 1] for n in range(100))


def texts(path: Path) -> None:
    """A folder of text files, one of them many times as long as the others."""
    path.mkdir()
    for number in range(24):
        (path / f"{number:02}.txt").write_text("\n\n".join(words(3, 9) for _ in range(20 if number == 7 else 4)))


def lowrank(arguments: list[str], folder: Path) -> str:
    """What the command prints.

    Raises:
        AssertionError: it failed.
    """
    command = [sys.executable, "-m", "lowrank", *arguments]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"lowrank {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("data", "write"), [("rows.jsonl", chats), ("questions.csv", table), ("texts", texts)])
def test_four_commands_lead_from_rows_to_an_answer_and_a_model(data, write: Callable[[Path], None], tmp_path):
    write(tmp_path / data)
    run = f"runs/{data.partition('.')[0]}"
    said = lowrank(["init", data, "--model", str(BASE), "--set", "training.max_steps=3"], tmp_path)
    assert said.endswith("the run can start: lowrank train run.yaml\n")
    lowrank(["train", "run.yaml"], tmp_path)
    assert any(
        B.any() for name, B in load_file(tmp_path / run / "adapter_model.safetensors").items() if "lora_B" in name
    )
    assert lowrank(["chat", run, "--prompt", "what is 7, and one?", "--max-new-tokens", "8"], tmp_path).strip()
    lowrank(["merge", run], tmp_path)
    merged = f"{run}-merged"
    assert (tmp_path / merged / "model.safetensors").stat().st_size > 200 * 2**20
    assert lowrank(["chat", merged, "--prompt", "what is 7, and one?", "--max-new-tokens", "8"], tmp_path).strip()
