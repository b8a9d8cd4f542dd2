"""What of it trains: a section a method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from lowrank.adapters.config import AdaLoraConfig, LoraConfig
from lowrank.config.sections.section import Section


class LoraSection(LoraConfig):
    """LoRA."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: Literal["lora"] = "lora"
    """LoRA: low-rank factors beside frozen weights; the default."""


class DoraSection(LoraConfig):
    """DoRA."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: Literal["dora"]
    """DoRA: the direction of each weight by low-rank factors, its magnitude by a vector."""

    use_dora: Literal[True] = True
    """Always true here; `method: dora` says it."""


class AdaLoraSection(AdaLoraConfig):
    """AdaLoRA."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: Literal["adalora"]
    """AdaLoRA: low-rank factors whose ranks shrink to a budget where they matter least."""


class FullSection(Section):
    """Every weight of the model trains; no adapter."""

    method: Literal["full"]
    """Every weight of the model."""


class BiasSection(Section):
    """Only the biases train (BitFit); no adapter."""

    method: Literal["bias"]
    """The biases alone (BitFit)."""


AdapterSection = Annotated[
    LoraSection | DoraSection | AdaLoraSection | FullSection | BiasSection, Field(discriminator="method")
]
