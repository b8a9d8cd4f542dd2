"""A job from its first check to its report, one file each; what several jobs share is in `parts`."""
