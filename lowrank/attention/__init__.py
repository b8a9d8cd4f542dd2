"""Attention backends: one file each, the registry that swaps them, and the self-test for packs."""

from __future__ import annotations

from lowrank.attention.backends import BACKENDS
from lowrank.attention.choice import AttentionChoice, set_attention
from lowrank.attention.forest import positions_of
from lowrank.attention.packing import check_packing, check_sharing, segments

__all__ = ["BACKENDS", "AttentionChoice", "check_packing", "check_sharing", "positions_of", "segments", "set_attention"]
