"""Checkpoints that transformers and vLLM read: out of a run, and in."""
