"""The model of a Hugging Face directory, as if it were that of a run."""

import pathlib

from jmoe import families
from jmoe.export import hf, safetensors
from jmoe.export.import_run import make_run, read_tokenizer
from jmoe.train.trained import Trained


def load_exported(directory: pathlib.Path, *, dtype: str | None = None) -> Trained:
    """Reads a directory that jmoe wrote, or any other of a known family, as step 0.

    Each weight stays in the dtype that its file has, but for FP8, which is dequantized
    to the config's `torch_dtype`. Nothing is written.

    Args:
      dtype: "float32" or "bfloat16", instead.

    Raises:
      FileNotFoundError: it has no config.json, no tokenizer.json, or not all weights.
      ValueError: a file is damaged, of a family that jmoe doesn't know, or has weights
        that aren't finite.
    """
    cfg = families.from_hf(safetensors.read_config(directory))
    tokenizer = read_tokenizer(directory, cfg)  # before the weights, which take long
    cfg, variables = hf.load(directory, dtype=dtype)
    return Trained(make_run(cfg, directory.absolute()), tokenizer, variables, 0)
