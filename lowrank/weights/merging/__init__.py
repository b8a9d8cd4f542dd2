"""An adapter into a checkpoint on disk, streamed, and the proof that it came out right."""
