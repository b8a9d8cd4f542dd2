"""What a run trains on, and the figures of it."""
