"""A config that Python gives as a mapping obeys the rules of a file; a run's folder stands for its config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lowrank.config import ConfigError, dump_config, load_config

VALUES = {
    "model": {"name_or_path": "m"},
    "adapter": {"r": 4, "target_modules": ("q_proj", "v_proj")},
    "data": {"train": Path("rows") / "t.jsonl"},
    "training": {"output_dir": "out", "learning_rate": 1e-4},
}


def test_a_mapping_is_what_the_file_would_be(tmp_path):
    plain = {**VALUES, "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "data": {"train": "rows/t.jsonl"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain))
    assert load_config(VALUES) == load_config(path)
    assert load_config(VALUES, ["training.seed=3"]).training.seed == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"training": {"output_dir": "o", "learning_rat": 1}}, "config: training.learning_rat: is not known"),
        ({"adapter": {"r": "four"}}, "config: adapter.r: 'four' is not a whole number"),
        ({"data": {"train": "t", "max_length": 10**30}}, "config: data.max_length: 1e+30 tokens are more than can be"),
        ({"adapter": {"r": object()}}, "is neither a text, a number"),
        ({"training": {"output_dir": "o", "load_best_model_at_end": True}}, "config: training."),
    ],
)
def test_its_mistakes_are_told(changed, said):
    with pytest.raises(ConfigError) as raised:
        load_config({**VALUES, **changed})
    assert said in str(raised.value)


def test_a_runs_folder_is_its_config(tmp_path):
    config = load_config(VALUES)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path) == config
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path / "..")
