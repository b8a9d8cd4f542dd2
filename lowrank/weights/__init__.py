"""Adapters and checkpoints on disk: save, load, streaming merge, compose, extract, export."""

from __future__ import annotations

from lowrank.weights.compose import ComposeReport as ComposeReport
from lowrank.weights.compose import compose as compose
from lowrank.weights.compose import resize as resize
from lowrank.weights.export import ExportReport as ExportReport
from lowrank.weights.export import export as export
from lowrank.weights.extract import ExtractReport as ExtractReport
from lowrank.weights.extract import extract as extract
from lowrank.weights.merge import merge_checkpoint as merge_checkpoint
from lowrank.weights.mergereport import MergeReport as MergeReport
from lowrank.weights.pretrained import load as load
from lowrank.weights.pretrained import wrap as wrap
from lowrank.weights.saving import save as save
