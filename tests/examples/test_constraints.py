"""constraints.txt pins everything that pyproject.toml asks for, exactly, and for every machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
VERSIONS = {canonicalize_name(name): version for name, version in (line.split("==") for line in PINS)}


def test_every_line_is_one_exact_version():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in PINS)
    assert len(VERSIONS) == len(PINS)
    assert VERSIONS["torch"] == "2.13.0"  # without "+cpu": that build is not on every index


def test_what_the_package_asks_for_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        if requirement.name != "lowrank":
            assert requirement.specifier.contains(VERSIONS[canonicalize_name(requirement.name)]), requirement
