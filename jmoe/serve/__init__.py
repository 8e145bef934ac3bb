"""Serving: what vLLM is asked for (`vllm_engine`), how it runs on Ray (`app`), and what
any engine stands behind (`front`, `protocol`)."""
