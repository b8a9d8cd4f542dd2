"""Which base an adapter belongs to: the sizes that two different models rarely share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from transformers import CONFIG_MAPPING, PretrainedConfig

from lowrank.errors import InputError

# The first of these names that a config has; families name them differently.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim"),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Sizes of a model, from its config; None where the config has no such size.

    For a composite model (vision and language) they are those of its text model: the text model that is taken out of
    a checkpoint and the whole one have the same fingerprint. `commit` is that of the hub's repository that the model
    was loaded from; None for a folder, and in older files.
    """

    model_type: str
    layers: int | None
    hidden_size: int | None
    intermediate_size: int | None
    vocab_size: int | None
    commit: str | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        """The fingerprint of a model with this config."""
        text = text_config(config)
        sizes = {ours: _first_int(text, theirs) for ours, theirs in _NAMES.items()}
        return cls(text.model_type, **sizes, commit=commit_of(config))

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: Path) -> Self:
        """The fingerprint in a file's metadata; InputError when it is not one."""
        names = {field.name for field in fields(cls)}
        sizes = names - {"model_type", "commit"}
        good = isinstance(raw.get("model_type"), str) and isinstance(raw.get("commit"), str | None)
        good = good and all(raw[name] is None or type(raw[name]) is int for name in sizes & raw.keys())
        if raw.keys() | {"commit"} != names or not good:
            raise InputError("the note about the base model in the file's metadata is damaged", where=str(where))
        return cls(**raw)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {name: value for name, value in asdict(self).items() if name != "commit" or value is not None}

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs, as "vocab_size 32000 (here 32064)" with `other` as "here".

        The name of the whole model's type in the place of its text model's, which files once had, is no difference.
        """
        mine, theirs = asdict(self), asdict(other)
        if (_text_type(self.model_type) or self.model_type) == (_text_type(other.model_type) or other.model_type):
            mine["model_type"] = theirs["model_type"]
        if None in (self.commit, other.commit):  # a folder may be a copy of any
            mine["commit"] = theirs["commit"]
        return [f"{name} {mine[name]} (here {theirs[name]})" for name in mine if mine[name] != theirs[name]]

    def differences_from(self, config: PretrainedConfig) -> list[str]:
        """What differs in a model with this config."""
        own = Fingerprint.of(config)
        return self.differences(
            replace(own, model_type=self.model_type) if config.model_type == self.model_type else own
        )


def commit_of(config: PretrainedConfig) -> str | None:
    """The commit of the hub's repository that a config was loaded from; None for one that comes from a folder."""
    return getattr(config, "_commit_hash", None)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a composite model's text model; any other model's is its own."""
    try:
        return config.get_text_config()
    except ValueError:  # several that could be meant
        return config


def _text_type(model_type: str) -> str | None:
    """The type of the text model inside a whole model of that type."""
    parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", {}) if model_type in CONFIG_MAPPING else {}
    return getattr(parts.get("text_config"), "model_type", None)


def _first_int(config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
