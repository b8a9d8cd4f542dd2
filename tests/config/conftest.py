from __future__ import annotations

import pytest

from lowrank.config import ConfigError, RunConfig, load_config

GOOD = """\
model:
  name_or_path: base
adapter:
  r: 4
data:
  train: rows.jsonl
training:
  output_dir: out
"""


@pytest.fixture
def good() -> str:
    """A config without mistakes; `adapter.r` is on line 4, `data.train` on 6, `training.output_dir` on 8."""
    return GOOD


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a config as run.yaml and loads it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> RunConfig:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return load_config("run.yaml", overrides)

    return load


@pytest.fixture
def told(load):
    """Loads a config with mistakes, and gives back what the error says, line by line."""

    def told(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            load(text, *overrides)
        assert raised.value.exit_code == 2
        return str(raised.value).splitlines()

    return told
