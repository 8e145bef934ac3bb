"""Checkpoints: asynchronous, atomic, and whole or not there."""
