"""What an adapter's config says whatever its method, in peft's words: the fields of `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


def _listed(value: object) -> object:
    """peft keeps sets and, for one name or index, a bare value; here they are lists."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value


Names = Annotated[list[str], BeforeValidator(_listed)]


class Targets(BaseModel):
    """Which modules get an adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    target_modules: Names | str | None = "all-linear"
    """Which modules get an adapter: a list of names (a name matches at the end of a module's path), a regular
    expression that must match the whole path, or "all-linear": every linear layer but the head and routers."""

    exclude_modules: Names | str | None = None
    """Modules left out, in the same two forms."""


class AdapterConfig(Targets):
    """The fields that every method has.

    Attributes:
        by_module: Fields whose keys are regular expressions on adapted modules -> the field that each overrides.
        by_tensor: Fields whose keys name a tensor of an adapted module -> the tensor's bare name.
    """

    by_module: ClassVar[Mapping[str, str]] = {}
    by_tensor: ClassVar[Mapping[str, str]] = {}

    fan_in_fan_out: bool = False
    """Accepted for peft's sake: the layout of a weight is read from its module, so a wrong value is refused."""

    bias: str = "none"
    """Which biases train; "none" and "all" mean the same for every method, a third word those of adapted modules."""

    modules_to_save: Names | None = None
    """Modules trained and saved whole, as a copy of their own (a new head, for example)."""

    layers_to_transform: list[int] | int | None = None
    """Only these layers, by number."""

    layers_pattern: Names | str | None = None
    """The name that stands before the layer's number ("layers", "h"), where it is not the first such name."""

    task_type: str | None = None
    """peft's note of the task ("CAUSAL_LM"); kept in the file, no effect here."""

    @model_validator(mode="after")
    def _layers(self) -> Self:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layer numbers stand, and layers_to_transform gives none")
        return self

    @property
    def method_name(self) -> str:
        """The name of the method in the registry."""
        raise NotImplementedError
