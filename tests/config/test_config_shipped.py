"""The configs that are shipped: each loads and says how to run it, the schema is that of the types."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest

from lowrank.config import RunConfig, load_config
from lowrank.config.schema import json_schema

ROOT = Path(__file__).parent.parent.parent
HEADER = "# yaml-language-server: $schema="


FOLDERS = ("configs", "examples/claims", "examples/classification", "examples/embedding")
SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", [path.relative_to(ROOT) for path in SHIPPED], ids=str)
def test_every_config_loads_and_says_how_to_run_it(path):
    load_config(ROOT / path)
    head = (ROOT / path).read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert head.startswith(f"{HEADER}{os.path.relpath('configs/schema.json', path.parent)}\n")
    assert f"lowrank train {path}" in head


def test_the_configs_are_what_init_would_write():
    """All but quickstart's, whose values its score rests on."""
    made = runpy.run_path(str(ROOT / "examples" / "make_configs.py"))
    assert {*made["SITUATIONS"]} == {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"quickstart"}
    for name in made["SITUATIONS"]:
        shipped = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        assert shipped == made["text_of"](name), "python examples/make_configs.py"


def test_the_shipped_schema_is_that_of_the_types():
    shipped = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert shipped == json_schema(), "python -m lowrank.config.schema > configs/schema.json"


def test_the_schema_tells_every_fields_meaning():
    schema = json.loads(json_schema())
    models = {name: body for name, body in schema["$defs"].items() if "properties" in body}
    fields = {f"{name}.{key}": spec for name, body in models.items() for key, spec in body["properties"].items()}
    assert [key for key, spec in fields.items() if not spec.get("description")] == []
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert all(body["additionalProperties"] is False for body in models.values())
