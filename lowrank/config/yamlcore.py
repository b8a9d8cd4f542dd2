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


# A config repeats a few values by anchors; a file that repeats itself so often is none.
MOST_NODES = 100_000


class CoreLoader(yaml.SafeLoader):
    """Reads scalars by the 1.2 core schema. An alias is a copy of what its anchor marks, which may not hold itself."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's way)

    def get_single_node(self) -> yaml.Node | None:
        """The document.

        Raises:
            ComposerError: an alias stands inside of what it stands for, or all of them make too much of a file.
        """
        node = super().get_single_node()
        if node is not None:
            _count(node, ())
        return node


def _count(node: yaml.Node, above: tuple[yaml.Node, ...]) -> int:
    """Nodes in a tree, those behind aliases each time."""
    if any(node is one for one in above):
        raise ComposerError(None, None, "an alias stands inside of what it stands for", node.start_mark)
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.CollectionNode):
        inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    total = 1
    for part in inner:
        total += _count(part, (*above, node))
        if total > MOST_NODES:
            raise ComposerError(None, None, "aliases repeat too much", node.start_mark)
    return total


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
