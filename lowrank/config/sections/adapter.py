"""The section `adapter`: a model for each method, made of the method's own config."""

from __future__ import annotations

from functools import lru_cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    SerializeAsAny,
    TypeAdapter,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError

from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.methods.method import Method
from lowrank.adapters.registry import METHODS
from lowrank.config.sections.section import Section

_LITERAL: Any = Literal
_ANNOTATED: Any = Annotated
"""Of types that are only known when they are used."""


class MethodSection(AdapterConfig):
    """A method's config, and the name of the method."""

    if TYPE_CHECKING:
        method: str


class FullSection(Section):
    """Every weight of the model trains; no adapter."""

    method: Literal["full"]
    """Every weight of the model."""


class BiasSection(Section):
    """Only the biases train (BitFit); no adapter."""

    method: Literal["bias"]
    """The biases alone (BitFit)."""


def adapter_sections() -> dict[str, type[BaseModel]]:
    """`adapter.method` -> the section's model, for every method that is registered by now."""
    return {**_of_methods(tuple(METHODS.items())), "full": FullSection, "bias": BiasSection}


def default_section() -> Any:
    """LoRA, as it is where nothing is said."""
    return adapter_sections()["lora"]()


@lru_cache(4)
def _of_methods(methods: tuple[tuple[str, Method], ...]) -> dict[str, type[BaseModel]]:
    return {name: _section(name, method) for name, method in methods}


def _section(name: str, method: Method) -> type[BaseModel]:
    fields: dict[str, Any] = {
        "method": (_LITERAL[name], Field(default="lora" if name == "lora" else ..., description=method.summary))
    }
    for key, value in method.fixed.items():
        written = str(value).lower() if isinstance(value, bool) else value
        told = f"Always {written} here; `method: {name}` says it."
        fields[key] = (_LITERAL[value], Field(default=value, description=told))
    label, doc = type(method).__name__, f"{method.summary.partition(':')[0]}."
    return create_model(f"{label}Section", __base__=(method.config, MethodSection), __doc__=doc, **fields)


def _by_method(given: Any) -> Any:
    """The section by its `method`, lora's where it names none."""
    sections = adapter_sections()
    if isinstance(given, (MethodSection, FullSection, BiasSection)):
        return given
    if not isinstance(given, dict):
        raise PydanticKnownError("model_attributes_type")
    method = given.get("method", "lora")
    if not isinstance(method, str) or method not in sections:
        context = {"discriminator": "'method'", "tag": str(method), "expected_tags": ", ".join(sections)}
        raise PydanticKnownError("union_tag_invalid", context)
    return sections[method].model_validate({"method": "lora", **given})


class _Schema:
    """What the schema of a config says of it: any of the methods."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        any_of_them: Any = _ANNOTATED[reduce(or_, adapter_sections().values()), Field(discriminator="method")]
        return handler(TypeAdapter(any_of_them).core_schema)


AdapterSection = Annotated[
    SerializeAsAny[MethodSection | FullSection | BiasSection], PlainValidator(_by_method), _Schema()
]
