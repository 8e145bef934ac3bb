"""Serving: what vLLM is asked for (`vllm_engine`), and how it runs on Ray (`app`)."""
