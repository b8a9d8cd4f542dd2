"""The script that tries the field's claims: its search, what it runs, what it makes of it."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest

from lowrank.config import load_config

CLAIMS = Path(__file__).parents[2] / "examples" / "claims"
sys.path.insert(0, str(CLAIMS))

import run  # noqa: E402
import table  # noqa: E402


@pytest.mark.parametrize("method", table.METHODS)
@pytest.mark.parametrize("task", list(run.TASKS))
@pytest.mark.parametrize("stage", ["search", "final"])
def test_every_job_is_a_config(method, task, stage):
    job = run.Job(task, method, stage, 3e-4, 1, 50)
    config = load_config(CLAIMS / f"{method}.yaml", job.overrides())
    assert (config.training.seed, config.training.max_steps, config.training.learning_rate) == (1, 50, 3e-4)
    assert load_config(CLAIMS / f"{method}.yaml").training.learning_rate in run.LADDER, "the search begins there"
    assert config.training.predict_with_generate == (stage == "final")
    assert (config.data.eval == run.SET_ASIDE) == (stage == "search"), "the search never sees the evaluation rows"
    assert Path(str(config.data.train)).name == f"{task}_train.jsonl"


@pytest.mark.parametrize(("below", "taken"), [(1.05, 1e-3), (1.2, 3e-3)])
def test_the_search_prefers_the_lower_of_two_rates_alike(below, taken, tmp_path, monkeypatch):
    losses = {1e-3: below, 3e-3: 1.0, 1e-2: 1.01}
    monkeypatch.setattr(run.Runs, "result", lambda _, job: {"eval_loss": losses[job.learning_rate]})
    assert run.Runs(Namespace(out=tmp_path, steps=8)).learning_rate("toolcalls", "lora") == taken


@pytest.mark.parametrize(("best", "tried"), [(3e-3, 3), (1e-5, 7), (1e-2, 4), (1e-3, 4)])
def test_the_search_ends_where_both_neighbours_are_worse(best, tried, tmp_path, monkeypatch):
    seen = set()

    def result(_, job):
        seen.add(job.learning_rate)
        return {"eval_loss": abs(run.LADDER.index(job.learning_rate) - run.LADDER.index(best))}

    monkeypatch.setattr(run.Runs, "result", result)
    assert run.Runs(Namespace(out=tmp_path, steps=8)).learning_rate("toolcalls", "lora") == best
    assert len(seen) == tried


def finished(method: str, seed: int, match: float, **changed) -> dict:
    measured = {
        "eval_loss": 0.5,
        "exact_match": match,
        "trainable": 1_000_000 if method == "full" else 9_000,
        "base_parameters": 1_000_000,
        "base_bytes": 700_000 if method == "qlora" else 2_000_000,
        "quantised_parameters": 800_000 if method == "qlora" else 0,
        "quantised_bytes": 400_000 if method == "qlora" else 0,
        "tokens_per_second": 100.0 + seed,
        "peak_bytes": 2**30,
        "file_bytes": 2**20,
        "machine": "a machine",
        "versions": {"torch": "2"},
    }
    return {**asdict(run.Job("kinship", method, "final", 3e-4, seed, 200)), **measured, **changed}


def test_the_table_says_what_was_found(tmp_path):
    runs = [finished("full", 0, 0.9), finished("lora", 0, 0.8), finished("lora", 1, 0.9), finished("qlora", 0, 0.84)]
    base = {**asdict(run.Job("kinship", "lora", "base", 0.0, 0, 0)), "eval_loss": 2.0, "exact_match": 0.1}
    (tmp_path / table.RUNS).write_text("".join(json.dumps(found) + "\n" for found in [base, *runs]))
    text = table.write(tmp_path)
    assert "The base answers 10.0% as expected; its loss is 2.0000. Every method trained for 200 steps" in text
    assert "Of 200 rows one is 0.5 points; the standard error of a score is up to 3.5." in text
    assert "| lora (2 seeds) | 3e-04 | 9,000 | 0.90% | 0.5000 | 85.0 % (80.0-90.0) | 2 MiB | 1024 MiB | 100 |" in text
    assert "-5.0 points with 99.1% fewer" in text
    assert "-1.0 points at 35%: the layers that are in 4 bits take 25% of what they took" in text
    assert (tmp_path / "claims.png").stat().st_size > 1000


def test_without_a_finished_run_there_is_no_table(tmp_path):
    with pytest.raises(SystemExit, match="holds no finished run yet"):
        table.write(tmp_path)


def test_no_question_is_in_both_splits():
    read = {
        split: (CLAIMS.parent / "data" / f"kinship_{split}.jsonl").read_text().splitlines()
        for split in ("train", "eval")
    }
    assert not set(read["train"]) & set(read["eval"])
    assert {split: len(set(rows)) for split, rows in read.items()} == {"train": 2000, "eval": 200}


def test_the_rows_are_those_that_the_script_makes(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    import make_kinship

    monkeypatch.setattr(sys, "argv", ["make_kinship.py", "--out", str(tmp_path)])
    make_kinship.main()
    for split in ("train", "eval"):
        name = f"kinship_{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (make_kinship.DATA / name).read_bytes()


@pytest.mark.slow
def test_it_runs_and_does_nothing_twice(base, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(CLAIMS.parents[1])
    tiny = [f"model.name_or_path={base}", "data.max_eval_rows=2", "data.max_length=1024", "data.max_train_rows=40"]
    arguments = ["--task", "kinship", "--method", "lora", "--method", "adalora", "--seeds", "1", "--steps", "12"]
    sets = [word for setting in tiny for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, *sets, "--out", str(tmp_path)])
    run.main()
    runs = table.read(tmp_path / table.RUNS)
    assert {found["method"] for found in runs if found["stage"] == "final"} == {"lora", "adalora"}
    assert all(found["trainable"] > 0 and found["peak_bytes"] > 0 for found in runs)
    capfd.readouterr()
    run.main()
    assert table.read(tmp_path / table.RUNS) == runs
    assert "===" not in capfd.readouterr().out
