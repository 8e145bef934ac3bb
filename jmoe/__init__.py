"""DeepSeek-V3-style mixture-of-experts language models in JAX."""
