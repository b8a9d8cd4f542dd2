"""Pages that open offline: one template each, under one style."""

from __future__ import annotations

import functools
from typing import Any

import jinja2


def page(name: str, **values: Any) -> str:
    """A page by its template's name."""
    return _environment().get_template(f"{name}.html.jinja").render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    """Which keeps the templates that it has compiled."""
    loader = jinja2.PackageLoader("lowrank.training")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
