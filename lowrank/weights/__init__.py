"""Adapters and checkpoints on disk: save, load, streaming merge, compose, extract, export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank.lazily import on_first_use

if TYPE_CHECKING:
    from lowrank.weights.arithmetic.composition import ComposeReport as ComposeReport
    from lowrank.weights.arithmetic.composition import compose as compose
    from lowrank.weights.arithmetic.composition import resize as resize
    from lowrank.weights.arithmetic.extraction import ExtractReport as ExtractReport
    from lowrank.weights.arithmetic.extraction import extract as extract
    from lowrank.weights.exporting import ExportReport as ExportReport
    from lowrank.weights.exporting import export as export
    from lowrank.weights.files.saving import save as save
    from lowrank.weights.merging.merge_checkpoint import merge_checkpoint as merge_checkpoint
    from lowrank.weights.merging.merge_report import MergeReport as MergeReport
    from lowrank.weights.pretrained import load as load
    from lowrank.weights.pretrained import wrap as wrap

__getattr__, __dir__, __all__ = on_first_use(__name__, __file__)
