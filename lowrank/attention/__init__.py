"""Attention backends: one file each, the registry that swaps them, and the self-test for packs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank.lazily import on_first_use

if TYPE_CHECKING:
    from lowrank.attention.backends import BACKENDS as BACKENDS
    from lowrank.attention.choice import AttentionChoice as AttentionChoice
    from lowrank.attention.choice import set_attention as set_attention
    from lowrank.attention.forest import positions_of as positions_of
    from lowrank.attention.isolation import check_packing as check_packing
    from lowrank.attention.isolation import check_sharing as check_sharing
    from lowrank.attention.packing import segments as segments

__getattr__, __dir__, __all__ = on_first_use(__name__, __file__)
