"""The five sections of a run's config, side by side."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from lowrank.config.sections import (
    AdapterSection,
    DataSection,
    ModelSection,
    QuantizationSection,
    TrainingSection,
    default_section,
)
from lowrank.tasks.kinds_of_task import CAUSAL_LM
from lowrank.training.losses.objective_kinds import SFT


class RunSections(BaseModel):
    """The sections, each checked by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, title="lowrank run")

    model: ModelSection
    """The base model."""

    quantization: QuantizationSection | None = None
    """For a base held in 4 or 8 bits (QLoRA); left out, it is not quantised."""

    adapter: AdapterSection = default_section()
    """What is trained on top of the base."""

    data: DataSection
    """What it is trained on."""

    training: TrainingSection
    """How it is trained, and where the results go."""

    @property
    def tasked(self) -> bool:
        """Whether the config names a task other than the next token."""
        return self.model.task not in (None, CAUSAL_LM)

    @property
    def preferring(self) -> bool:
        """Whether it learns from preferences."""
        return self.training.objective != SFT

    @property
    def packs(self) -> bool:
        """Whether examples come in packs without padding."""
        return self.data.packing and not self.tasked

    @property
    def compute_dtype(self) -> str:
        """What products are computed in: `model.compute_dtype`, or bitsandbytes' name for the same."""
        told = self.quantization.bnb_4bit_compute_dtype if self.quantization is not None else None
        return told or self.model.compute_dtype
