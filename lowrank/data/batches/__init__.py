"""From examples to batches: packs or padded rows, in an order that a run resumes anywhere in."""
