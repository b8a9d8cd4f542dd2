"""What changes a model for a run: kernels, recomputation, sharding, noise."""
