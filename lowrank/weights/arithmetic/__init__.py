"""Adapters made of adapters and of differences: composed, resized, extracted."""
