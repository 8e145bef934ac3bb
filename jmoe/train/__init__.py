"""Optimizer, state, step and loop."""
