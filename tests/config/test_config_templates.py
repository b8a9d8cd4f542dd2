"""The configs that are shipped: each loads, each is what `lowrank init` writes, the schema is that of the types."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lowrank.config import RunConfig, load_config
from lowrank.config.schema import json_schema
from lowrank.errors import InputError
from lowrank.recipes.init import SCHEMA, write_config

ROOT = Path(__file__).parent.parent.parent
TEMPLATES = ROOT / "lowrank" / "config" / "templates"
NAMES = ["quickstart", "lora", "qlora", "dora"]
HEADER = "# yaml-language-server: $schema="


SHIPPED = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "examples" / "claims").glob("*.yaml")])


@pytest.mark.parametrize("path", [path.relative_to(ROOT) for path in SHIPPED], ids=str)
def test_every_config_loads_and_says_how_to_run_it(path):
    load_config(ROOT / path)
    head = (ROOT / path).read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert head.startswith(f"{HEADER}{os.path.relpath('configs/schema.json', path.parent)}\n")
    assert f"lowrank train {path}" in head


def test_the_templates_are_the_configs_of_the_same_name():
    assert sorted(path.stem for path in TEMPLATES.iterdir()) == sorted(NAMES)
    for name in NAMES:
        ours, theirs = TEMPLATES / f"{name}.yaml", ROOT / "configs" / f"{name}.yaml"
        assert ours.read_text() == theirs.read_text(), f"cp configs/{name}.yaml lowrank/config/templates/"


def test_the_shipped_schema_is_that_of_the_types():
    shipped = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert shipped == json_schema(), "python -m lowrank.config.schema > configs/schema.json"


@pytest.mark.parametrize("name", NAMES)
def test_init_writes_a_config_and_the_schema_it_points_to(tmp_path, name):
    path = write_config(tmp_path / "mine.yaml", name)
    head = path.read_text().splitlines()[:6]
    assert head[0] == f"{HEADER}{SCHEMA}"
    assert f"#   lowrank train {path}" in head
    assert load_config(path) == load_config(ROOT / "configs" / f"{name}.yaml")
    assert (tmp_path / SCHEMA).read_text() == json_schema()


def test_init_overwrites_nothing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    for there in (path, tmp_path):
        with pytest.raises(InputError, match="exists already"):
            write_config(there, "lora")
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_init_needs_the_folder(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*none/run\.yaml: No such file or directory"):
        write_config(tmp_path / "none" / "run.yaml", "lora")


def test_the_schema_tells_every_fields_meaning():
    schema = json.loads(json_schema())
    models = {name: body for name, body in schema["$defs"].items() if "properties" in body}
    fields = {f"{name}.{key}": spec for name, body in models.items() for key, spec in body["properties"].items()}
    assert [key for key, spec in fields.items() if not spec.get("description")] == []
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert all(body["additionalProperties"] is False for body in models.values())
