"""The JSON Schema of a run's config, made from the types: editors check and complete with it.

python -m lowrank.config.schema > configs/schema.json
"""

from __future__ import annotations

import json

from lowrank.config.run_config import RunConfig


def json_schema() -> str:
    """The schema as a text."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
