from __future__ import annotations

from short_run import base, write_config

__all__ = ["base", "write_config"]
