"""Optimizer, state, step, loop and what the user sees of them."""
