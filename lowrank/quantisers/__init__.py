"""Libraries that hold a base's weights in few bits: one file each, and a line in the registry."""
