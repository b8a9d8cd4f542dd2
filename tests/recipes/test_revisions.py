"""The commit that a base was loaded from is written beside its adapter, and every verb loads that one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from tiny import tiny_llama, tiny_tokenizer

import lowrank
from lowrank.errors import InputError
from lowrank.models import load_model
from lowrank.recipes.chat import chat, open_model
from lowrank.recipes.evaluate import evaluate
from lowrank.recipes.export import export_adapter
from lowrank.recipes.merge import merge_adapter
from lowrank.weights import compose, extract, resize

NAME = "somebody/tiny"
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with a repository of two commits; `main` and the tag `v2` are the newer one, `v1` is the older."""
    cache = tmp_path / "hub"
    repository = cache / "models--somebody--tiny"
    for seed, commit in enumerate((OLD, NEW)):
        torch.manual_seed(seed)
        folder = repository / "snapshots" / commit
        transformers.LlamaForCausalLM(tiny_llama().config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    (repository / "refs").mkdir()
    for name, commit in (("main", NEW), ("v2", NEW), ("v1", OLD)):
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return repository / "snapshots"


@pytest.fixture
def trained(hub):
    """An adapter of the older commit."""
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"name_or_path": NAME, "revision": "v1"},
        "adapter": {"r": 2},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_length": 64},
        "training": {"output_dir": "out", "max_steps": 3, "learning_rate": 1e-2, "report_to": "none"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    return lowrank.train("run.yaml")


def test_the_commit_is_written_and_honoured_by_every_verb(trained, hub):
    assert json.loads(Path("out/adapter_config.json").read_text())["revision"] == OLD
    old = transformers.AutoModelForCausalLM.from_pretrained(hub / OLD)
    ids = torch.arange(5, 30)[None]
    model, _ = open_model("out")
    wanted = model(ids).logits
    torch.testing.assert_close(wanted, lowrank.load(old, "out")(ids).logits)
    merge_adapter("out", "merged", verify=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    config = yaml.safe_load(Path("run.yaml").read_text())
    del config["model"]["revision"]
    Path("main.yaml").write_text(yaml.safe_dump(config))
    assert evaluate("main.yaml", adapter="out").loss == pytest.approx(trained.after.loss, rel=1e-5)
    assert "--revision " + OLD in export_adapter("out", "exported", to="vllm").command
    export_adapter("out", "gguf", to="llama.cpp")
    resize("out", 1, out="smaller")
    compose(["out", "smaller"], out="both")
    for folder in ("exported", "gguf", "smaller", "both"):
        assert json.loads((Path(folder) / "adapter_config.json").read_text())["revision"] == OLD, folder
    extract(NAME, "merged", 2, out="extracted")
    assert json.loads(Path("extracted/adapter_config.json").read_text())["revision"] == NEW


def test_another_commit_is_refused(trained, hub):
    with pytest.raises(InputError, match=f"commit {OLD} \\(here {NEW}\\)"):
        lowrank.load(load_model(NAME), "out")
    with pytest.raises(InputError, match=f"commit {OLD} \\(here {NEW}\\)"):
        merge_adapter("out", "merged", hub / NEW, verify=False)
    assert not Path("merged").exists()
    with pytest.raises(InputError, match=f"commit {OLD} \\(here {NEW}\\)"):
        evaluate("run.yaml", adapter="out", overrides=["model.revision=v2"])
    with pytest.raises(InputError, match=f"commit {OLD} \\(here {NEW}\\)"):
        chat("out", prompts=["Hi"], base=str(hub / NEW))


def test_a_commit_that_is_not_there_is_named(trained, hub):
    shutil.rmtree(hub / OLD)
    with pytest.raises(InputError, match=OLD):
        merge_adapter("out", "merged", verify=False)
    with pytest.raises(InputError):
        open_model("out")


def test_adapters_of_two_commits_are_not_composed(trained, hub):
    config = json.loads(Path("out/adapter_config.json").read_text())
    shutil.copytree("out", "other")
    Path("other/adapter_config.json").write_text(json.dumps(config | {"revision": NEW}))
    with pytest.raises(InputError, match="different revisions"):
        compose(["out", "other"], out="both")


def test_a_copy_in_a_folder_is_taken_for_what_it_says(trained, hub):
    shutil.copytree(hub / OLD, "copy")
    merge_adapter("out", "merged", "copy", verify=False)
    assert chat("out", prompts=["Hi"], base="copy", max_new_tokens=2) == chat("out", prompts=["Hi"], max_new_tokens=2)


def test_older_adapters_have_no_commit(hub):
    model = lowrank.wrap(tiny_llama(), lowrank.LoraConfig(r=2))
    lowrank.save(model, "folder")
    assert json.loads(Path("folder/adapter_config.json").read_text())["revision"] is None
    lowrank.load(tiny_llama(), "folder")


def test_an_adapter_is_asked_by_its_name_on_the_hub(trained, hub):
    folder = hub.parent.parent / "models--somebody--adapter" / "snapshots" / NEW
    shutil.copytree("out", folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text(NEW)
    asked = {"prompts": ["Hi"], "max_new_tokens": 4}
    assert chat("somebody/adapter", **asked) == chat("out", **asked)
    with pytest.raises(InputError, match="somebody/nothing is no folder here, and the hub cannot be reached"):
        chat("somebody/nothing", **asked)
