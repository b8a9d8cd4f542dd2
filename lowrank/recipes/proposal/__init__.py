"""What `lowrank init` knows before it writes, and the rules by which it writes: every value with its reason."""
