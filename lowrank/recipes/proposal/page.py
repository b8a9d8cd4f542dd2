"""Settings as YAML in which every value stands beside its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from lowrank.config.yamlcore import CoreDumper
from lowrank.recipes.proposal.rules import Setting

COLUMN = 44


def as_yaml(settings: Sequence[Setting], head: Sequence[str]) -> str:
    """The config's text.

    Args:
        settings: In the order of their sections.
        head: Lines of comment before it.
    """
    lines = [f"# {line}".rstrip() for line in head]
    section = None
    for setting in settings:
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section}:"]
        lines.append(f"{f'  {setting.key}: {_scalar(setting.value)}':{COLUMN}}  # {setting.reason}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    text = yaml.dump(value, Dumper=CoreDumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
