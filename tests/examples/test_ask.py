"""The script that asks a model folder with plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ask
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer


def test_the_model_is_asked_with_the_system_prompt(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    prompt = torch.tensor([tokenizer.encode(text)])
    expected = model.generate(prompt, do_sample=False, max_new_tokens=100)[0, prompt.shape[1] :]
    assert ask.ask(tmp_path, "hello", "be brief") == tokenizer.decode(expected, skip_special_tokens=True)


def test_system_of_reads_the_first_row(tmp_path):
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    assert ask.system_of(rows) == "be brief"
    rows.write_text(json.dumps({"messages": turns[1:]}) + "\n")
    with pytest.raises(SystemExit, match=r"rows\.jsonl"):
        ask.system_of(rows)


def test_the_script_needs_no_lowrank():
    """A merged folder has to work where lowrank was never installed, so this must not import it."""
    code = "import sys; sys.modules['lowrank'] = None; import ask"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(ask.__file__).parent)
