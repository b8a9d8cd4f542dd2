"""Adapters on the experts of mixture-of-experts models."""
