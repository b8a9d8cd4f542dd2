"""Pages that open offline: one template each, under one style."""

from __future__ import annotations

from typing import Any

import jinja2


def page(name: str, **values: Any) -> str:
    """A page by its template's name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowrank.training"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(f"{name}.html.jinja").render(**values)
