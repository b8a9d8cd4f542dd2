"""Everything that can be plugged in, by name: one line each."""

from __future__ import annotations

from lowrank.adapters.adalora import AdaLoraLayer
from lowrank.adapters.conv import ConvKind
from lowrank.adapters.dora import DoraLayer
from lowrank.adapters.embedding import EmbeddingKind
from lowrank.adapters.kinds import Kind
from lowrank.adapters.linear import Conv1DKind, LinearKind
from lowrank.adapters.lora import LoraLayer
from lowrank.adapters.method import LowRankLayer

METHODS: dict[str, type[LowRankLayer]] = {"lora": LoraLayer, "dora": DoraLayer, "adalora": AdaLoraLayer}

KINDS: tuple[Kind, ...] = (LinearKind(), Conv1DKind(), EmbeddingKind(), ConvKind())
