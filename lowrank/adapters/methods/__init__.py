"""One file a method: what its layer is, and its term."""
