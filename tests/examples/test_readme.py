"""What the README shows has to work: its YAML is a valid config, its Python names exist, its commands too."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lowrank
from lowrank.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_the_yaml_is_a_valid_config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "run.yaml"
    path.write_text(block("yaml"))
    config = load_config(path)
    assert config.adapter.r == 16
    assert Path(config.data.train).exists()


def test_the_python_uses_names_that_exist():
    used = [node for node in ast.walk(ast.parse(block("python"))) if isinstance(node, ast.Attribute)]
    names = {node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "lowrank"}
    assert len(names) >= 4
    assert all(hasattr(lowrank, name) for name in names)


def test_the_make_targets_exist():
    targets = re.findall(r"^    make ([\w-]+)$", README, re.MULTILINE)
    assert targets[:2] == ["quickstart", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
