"""An adapter's folder to the hub, against a local stand-in of its API."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from hubstandin import TOKEN, serving
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

import lowrank
from lowrank import LoraConfig
from lowrank.cli import main
from lowrank.errors import InputError
from lowrank.weights.cards import FILE as CARD
from lowrank.weights.cards import is_made, may_write, signed

GOES = {
    CARD,
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "system_prompt.txt",
    "additional_chat_templates/tool_use.jinja",
}
STAYS = (
    ".lock",
    "config.yaml",
    "metrics.jsonl",
    "report.html",
    "checkpoints/step-1/state.pt",
    "logs/events",
    "note.md",
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with serving(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    model = lowrank.wrap(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    folder = lowrank.save(model, tmp_path / "run")
    tiny_tokenizer().save_pretrained(folder)
    texts = {"system_prompt.txt": "Be brief.", "additional_chat_templates/tool_use.jinja": "{}", CARD: signed("# Mine")}
    for name, text in {**texts, **dict.fromkeys(STAYS, "stays here")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def lowrank_export(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["export", *map(str, arguments), "--to", "hub"])
    return int(exited.value.code or 0)


def test_what_the_adapter_is_used_with_goes_and_nothing_else(hub, run, capsys):
    assert lowrank_export(run, "me/mine") == 0
    there = hub.repos["me/mine"]
    assert set(there) == GOES
    assert all(content == (run / name).read_bytes() for name, content in there.items())
    assert f"uploaded to {hub.address}/me/mine" in capsys.readouterr().out
    assert not hub.private["me/mine"]
    assert lowrank_export(run, "me/mine") == 0  # into a repository that is there
    assert lowrank_export(run, "hidden", "--private") == 0  # without a user it is the token's
    assert hub.private["me/hidden"]


def test_a_dry_run_names_files_and_sizes_and_asks_nobody(hub, run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert lowrank_export(run, "me/mine", "--dry-run") == 0
    out = capsys.readouterr().out
    for name in GOES:
        assert f"  {name}  {(run / name).stat().st_size:,} bytes" in out
    assert not any(name in out for name in STAYS)
    assert f"would upload {len(GOES)} files" in out
    assert not hub.asked


def test_a_card_that_a_person_changed_on_the_hub_stays(hub, run, capsys):
    hub.repos["me/mine"] = {CARD: b"# What I wrote"}
    assert lowrank_export(run, "me/mine") == 0
    assert hub.repos["me/mine"][CARD] == b"# What I wrote"
    assert set(hub.repos["me/mine"]) == GOES
    assert "was changed there" in capsys.readouterr().out
    (run / CARD).write_text("# Written here, by a person")
    assert lowrank_export(run, "me/mine") == 0
    assert hub.repos["me/mine"][CARD] == b"# Written here, by a person"


@pytest.mark.parametrize(
    ("broken", "name", "why", "what_to_do"),
    [
        ("no token", "me/mine", "no token for the hub", "hf auth login"),
        ("wrong token", "me/mine", "does not accept the token", "HF_TOKEN"),
        ("", "others/mine", "may not write to others/mine", "a name of your own"),
        ("offline", "me/mine", "HF_HUB_OFFLINE is set", "Unset it"),
        ("no network", "me/mine", "the hub cannot be reached (ConnectError)", "Check the network"),
        ("no adapter", "me/mine", "no adapter folder", "adapter_config.json"),
        ("", "me/mine/more", "cannot be the name of a repository", "user/name"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(hub, run, capsys, monkeypatch, broken, name, why, what_to_do):
    if broken == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif broken == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_another")
    elif broken == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif broken == "no network":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    elif broken == "no adapter":
        (run / "adapter_config.json").unlink()
    assert lowrank_export(run, name) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert why in told
    assert what_to_do in told
    assert not any(hub.repos.values())


def test_a_card_is_ours_until_a_letter_changes(tmp_path):
    text = signed("---\ntags: [lora]\n---\n# A card")
    assert is_made(text)
    assert may_write(tmp_path)
    for change in (text.replace("card", "cart"), text + "more", "# peft's own\n", text.replace("sha256", "")):
        assert not is_made(change)
        (tmp_path / CARD).write_text(change)
        assert not may_write(tmp_path)
    (tmp_path / CARD).write_text(text)
    assert may_write(tmp_path)


def test_push_to_hub_of_a_wrapped_model_takes_its_adapters_and_nothing_else(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = lowrank.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2))
    lowrank.wrap(model, LoraConfig(r=4), adapter="second")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "training_args.bin").write_text("stays here")
    pushed = {"push_to_hub": True, "token": TOKEN, "private": True}
    model.save_pretrained(folder, **pushed, commit_message="Both", create_pr=True)
    parts = {"adapter_config.json", "adapter_model.safetensors"}
    there = hub.repos["me/mine"]
    assert set(there) == parts | {f"second/{part}" for part in parts}
    assert all(content == (folder / name).read_bytes() for name, content in there.items())
    assert hub.private["me/mine"]
    assert hub.messages == ["Both"]
    assert hub.asked[-1].endswith("?create_pr=1")
    with pytest.raises(InputError, match="no token for the hub"):
        model.save_pretrained(folder, push_to_hub=True)


def test_push_to_hub_takes_a_base_that_is_nowhere_else(hub, tmp_path):
    model = lowrank.wrap(tiny_llama(), LoraConfig(r=2))
    model.save_pretrained(tmp_path / "run", push_to_hub=True, repo_id="me/whole")
    names = {"adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"}
    assert set(hub.repos["me/whole"]) >= names
    assert set(hub.repos["me/whole"]) <= {*names, "generation_config.json"}
    assert hub.messages == ["Adapter"]
    assert "create_pr" not in hub.asked[-1]
