"""The machine under a run: its processes, its memory."""
