"""The five sections of a run's config: every field with its type, default and meaning."""

from __future__ import annotations

from lowrank.config.sections.adapter import (
    AdapterSection,
    BiasSection,
    FullSection,
    MethodSection,
    adapter_sections,
    default_section,
)
from lowrank.config.sections.data import DataSection, SourceSection
from lowrank.config.sections.model import ModelSection, QuantizationSection
from lowrank.config.sections.section import OnResume
from lowrank.config.sections.training import MAX_SEED, ParameterGroup, TrainingSection

__all__ = [
    "MAX_SEED",
    "AdapterSection",
    "BiasSection",
    "DataSection",
    "FullSection",
    "MethodSection",
    "ModelSection",
    "OnResume",
    "ParameterGroup",
    "QuantizationSection",
    "SourceSection",
    "TrainingSection",
    "adapter_sections",
    "default_section",
]
