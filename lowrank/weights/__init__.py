"""Adapters and checkpoints on disk: save, load, streaming merge, compose, extract, export."""

from __future__ import annotations

from lowrank.weights.arithmetic.composition import ComposeReport, compose, resize
from lowrank.weights.arithmetic.extraction import ExtractReport, extract
from lowrank.weights.exporting import ExportReport, export
from lowrank.weights.files.saving import save
from lowrank.weights.merging.merge_checkpoint import merge_checkpoint
from lowrank.weights.merging.merge_report import MergeReport
from lowrank.weights.pretrained import load, wrap

__all__ = [
    "ComposeReport",
    "ExportReport",
    "ExtractReport",
    "MergeReport",
    "compose",
    "export",
    "extract",
    "load",
    "merge_checkpoint",
    "resize",
    "save",
    "wrap",
]
