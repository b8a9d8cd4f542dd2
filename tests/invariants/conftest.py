from __future__ import annotations

from runs import base, write_config

__all__ = ["base", "write_config"]
