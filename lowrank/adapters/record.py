"""What a wrapped model knows of its adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lowrank.adapters.activity import Setting
from lowrank.adapters.config import AdapterConfig
from lowrank.adapters.foreign import refuse_foreign
from lowrank.adapters.install import Activity
from lowrank.adapters.modules import bare
from lowrank.errors import InputError

_ATTRIBUTE = "_lowrank"


@dataclass
class Record:
    """Hangs on a wrapped model.

    Attributes:
        activity: Shared with every adapted module.
        configs: Each adapter's config.
        strengths: For each adapter, what its trained scale is multiplied with; shared with its layers.
        matched: For each adapter, how many modules each pattern matched.
        left_out: For each adapter, the layers that "all-linear" leaves out because nothing calls them, and why.
        places: For each adapter, the modules that carry it by path, and the sizes that they had.
        trained_before: The base parameters that required gradients before the first `wrap`, by name.
        patched: The attributes that stand on the model before its class's, until its adapters are gone.
    """

    activity: Activity = field(default_factory=Activity)
    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    strengths: dict[str, Setting[float]] = field(default_factory=dict)
    matched: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    places: dict[str, dict[str, tuple[object, ...] | None]] = field(default_factory=dict)
    trained_before: set[str] = field(default_factory=set)
    patched: set[str] = field(default_factory=set)

    def patch(self, model: nn.Module, name: str, value: object) -> None:
        """Puts an attribute before that of the model's class; it goes with the record."""
        self.patched.add(name)
        model.__dict__[name] = value

    def check_known(self, names: tuple[str, ...]) -> None:
        """Raises InputError for a name that is no adapter of this model."""
        for name in names:
            if name not in self.configs:
                raise InputError(f"the model has no adapter {name!r}; it has {', '.join(self.configs)}")


def find_record(model: nn.Module) -> Record | None:
    """The model's record, None if it carries no adapter."""
    return bare(model).__dict__.get(_ATTRIBUTE)


def record_of(model: nn.Module) -> Record:
    """The model's record. Raises InputError if it carries no adapter."""
    record = find_record(model)
    if record is None:
        refuse_foreign(model)
        raise InputError(
            f"this {type(model).__name__} carries no adapter", fix="Call lowrank.wrap or lowrank.load first."
        )
    return record


def attach(model: nn.Module, record: Record) -> None:
    """Hangs a record on a model."""
    bare(model).__dict__[_ATTRIBUTE] = record


def detach(model: nn.Module) -> None:
    """Takes it off, and what it put before the class's own."""
    inner = bare(model)
    record = inner.__dict__.pop(_ATTRIBUTE, None)
    for name in () if record is None else record.patched:
        inner.__dict__.pop(name, None)
