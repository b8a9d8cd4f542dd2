from __future__ import annotations

from labelled import bases, write_task

__all__ = ["bases", "write_task"]
