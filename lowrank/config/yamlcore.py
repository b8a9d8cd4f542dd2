"""YAML as people mean it: PyYAML's safe loader and dumper with the words of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-4` is a text, `no` and `off` are booleans, `010` is 8, `1:30` is 90 and `2024-01-01`
is a date. Under the 1.2 rules, which editors follow too, what looks like a number is one, every other word is a text.
"""

from __future__ import annotations

import re

import yaml
from yaml.composer import ComposerError
from yaml.emitter import ScalarAnalysis

TAG = "tag:yaml.org,2002:"
"""What the names of YAML's own types begin with."""

_WORDS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
"""Tag, what is read as it (the 1.2 core schema), and the characters that it can begin with."""


class CoreLoader(yaml.SafeLoader):
    """Reads scalars by the 1.2 core schema. Aliases are refused: a config is read from top to bottom."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's way)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node; never one that stands elsewhere already."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            what = f"the alias *{event.anchor} is not supported; write the value out"
            raise ComposerError(None, None, what, event.start_mark)
        return super().compose_node(parent, index)


class CoreDumper(yaml.SafeDumper):
    """Writes what both kinds of readers understand alike: a text that either would misread gets quotes."""

    def analyze_scalar(self, scalar: str) -> ScalarAnalysis:
        """How a text may be written; line ends other than \\n only as escapes, which is where PyYAML errs."""
        analysis = super().analyze_scalar(scalar)
        if any(end in scalar for end in "\x85\u2028\u2029"):
            analysis.allow_flow_plain = analysis.allow_block_plain = False
            analysis.allow_single_quoted = analysis.allow_block = False
        return analysis


def _int(loader: CoreLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


CoreLoader.add_constructor(f"{TAG}int", _int)
for _name, _pattern, _first in _WORDS:
    CoreLoader.add_implicit_resolver(f"{TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
    CoreDumper.add_implicit_resolver(f"{TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
