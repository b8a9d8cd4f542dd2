from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from tiny import tiny_llama, tiny_tokenizer

import lowrank

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_in_python.py"


def test_it_runs_on_a_tiny_model(tmp_path):
    base = tmp_path / "base"
    tiny_llama(max_position_embeddings=1024).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    rows.write_text(f"{json.dumps({'messages': turns})}\n")
    out = tmp_path / "out"
    subprocess.run([sys.executable, str(SCRIPT), str(base), str(rows), str(out), "2"], check=True, capture_output=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    adapted = lowrank.load(transformers.AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)
