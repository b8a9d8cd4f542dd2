"""The `sdpa` backend: torch's scaled_dot_product_attention, through transformers' own integration.

It knows no soft-capping and no sinks, and packs and padded batches need a square mask.
"""

from __future__ import annotations

from lowrank.attention.backend import Backend
from lowrank.attention.setting import Setting


def _refusal(setting: Setting) -> str | None:
    if setting.softcap:
        return "it cannot soft-cap the scores"
    if setting.sinks:
        return "it knows no attention sinks"
    if not setting.supports_sdpa:
        return "transformers has no scaled_dot_product_attention path for this architecture"
    return None


def _implementation(setting: Setting) -> str:
    return "sdpa"


SDPA = Backend("sdpa", _refusal, _implementation, "needs no square of scores where no mask is needed")
