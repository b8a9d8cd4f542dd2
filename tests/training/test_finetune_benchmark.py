"""What the benchmark of fine-tunes says of its contestants."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("finetune", "finetune_report", "cases", "yardstick", "meter", "job")


@pytest.fixture
def finetune(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "contestants"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import finetune

    yield finetune
    for name in MODULES:
        sys.modules.pop(name, None)


def test_time_to_the_same_loss_is_to_pefts_last_on_the_same_rows(finetune):
    import finetune_report

    peft = finetune.Outcome({0: {"losses": [9.0, 5.0]}, 1: {"losses": [9.0, 3.0]}})
    other = finetune.Outcome({n: {"losses": [6.0, 5.0, 4.0], "ended_after": [1.0, 2.0, 3.0]} for n in range(3)})
    assert finetune_report.until_loss(other, peft) == [2.0, float("inf")]


def test_why_a_contestant_does_not_run_is_the_first_line_of_its_error(finetune):
    stderr = "a warning\nTraceback (most recent call last):\n  File x\n    y\nImportError: not here\nsecond line\n"
    assert finetune.first_line(stderr) == "ImportError: not here"
    assert finetune.first_line("no traceback: killed") == ""


def test_a_contestant_without_its_environment_is_told_so(finetune, tmp_path):
    contestant = finetune.Contestant("lowrank_run.py", python=tmp_path / "python")
    result, why_not = finetune.run(contestant, finetune.Job("model"))
    assert result is None
    assert "environment is not there" in why_not


def test_rows_fall_into_steps_and_carry_loss_on_few_tokens(finetune):
    import job

    rows = job.rows_of(job.Job("model", rows=4, steps=3), 5000)
    assert len(rows) == 12
    assert rows == job.rows_of(job.Job("model", rows=4, steps=3), 5000)
    tokens, supervised = job.counted(rows)
    assert supervised == pytest.approx(tokens / 2, rel=0.02)
    assert len({label for _, labels in rows for label in labels if label != job.IGNORED}) <= job.ALPHABET
    assert min(min(ids) for ids, _ in rows) >= 10


def test_operations_are_those_of_the_models_own_shapes(finetune, tmp_path):
    import yardstick
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = LlamaForCausalLM(config)
    linear = sum(parameter.numel() for name, parameter in model.named_parameters() if "proj" in name)
    assert yardstick.operations_a_token(str(tmp_path), 0.25) == 4 * (linear + 0.25 * 32 * 50)
    ends = sum(sum(parameter.shape) for name, parameter in model.named_parameters() if "proj" in name)
    pairs = (1 + 2 + 3 + 1) / 4  # of tokens and those that they see, for each token
    assert yardstick.operations_beside(str(tmp_path), 8, [3, 1]) == 6 * 8 * ends + 3 * (2 * 6 * 4 * 16 * pairs)
