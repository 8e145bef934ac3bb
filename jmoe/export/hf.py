"""Hugging Face directories from Python: `save` variables to one, `load` one.

A directory is what `from_pretrained` and vLLM read: config.json, one or several
safetensors files and, with several, their index.
"""

import pathlib
from typing import Any

from jmoe.config import ModelConfig
from jmoe.export import card, run, sources, write


def save(
    path: str | pathlib.Path,
    cfg: ModelConfig,
    variables: Any,
    *,
    fp8: bool = False,
    tokenizer: str | pathlib.Path | None = None,
    shard_bytes: int = write.SHARD_BYTES,
) -> None:
    """Writes variables as a new directory that transformers and vLLM load.

    Args:
      variables: `params` and `router_state`, every leaf float32 or bfloat16; they are
        written in the type they have.
      fp8: writes the matrices of attention and MLPs as block FP8 and the rest as
        bfloat16. Weights that `load` kept in FP8 are written as they are without it.
      tokenizer: a tokenizer.json to put beside them.
      shard_bytes: about how large a file may be.

    Raises:
      ValueError: `path` exists, or the variables aren't those of `cfg`.
    """
    texts: dict[str, Any] = {}
    eos_id = None
    if tokenizer is not None:
        source_file = pathlib.Path(tokenizer)
        texts = card.tokenizer_files(source_file, cfg.max_positions)
        eos_id = card.Tokenizer.from_file(source_file).eos_id
        texts[card.GENERATION] = card.generation_json(eos_id)
    source = sources.InMemory(variables)
    dtype = "fp8" if fp8 else None
    made = run.make_plan(cfg, source, dtype=dtype, shard_bytes=shard_bytes)
    run.write_directory(
        pathlib.Path(path), cfg, made, source, texts, eos_id, lambda _: None
    )
