"""All backends by name."""

from __future__ import annotations

from lowrank.attention.backend_names import BACKEND_NAMES
from lowrank.attention.eager import EAGER
from lowrank.attention.flash import FLASH
from lowrank.attention.flex import FLEX
from lowrank.attention.paged import PAGED
from lowrank.attention.sdpa import SDPA
from lowrank.attention.segmentwise import SEGMENTS

BACKENDS = {backend.name: backend for backend in (EAGER, SDPA, SEGMENTS, FLASH, FLEX, PAGED)}

assert tuple(BACKENDS) == BACKEND_NAMES
