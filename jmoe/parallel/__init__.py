"""How a step is spread over devices; knows axes, not models."""
