"""The model of a Hugging Face directory, as if it were that of a run."""

import contextlib
import pathlib
from collections.abc import Iterator

from jmoe import families
from jmoe.checkpoint.unread import Leaves, Unread
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
    looked_at = look_at_exported(directory)  # before the weights, which take long
    _, variables = hf.load(directory, dtype=dtype)
    return looked_at._replace(variables=variables)


def look_at_exported(directory: pathlib.Path, *, dtype: str | None = None) -> Trained:
    """Returns what `load_exported` does, but for weights that are yet to be read.

    Raises:
      FileNotFoundError, ValueError: as `load_exported`; of weights who reads them is
        told.
    """

    @contextlib.contextmanager
    def opened() -> Iterator[Leaves]:
        with hf.opened(directory, dtype=dtype) as reader:
            yield Leaves(reader.leaves, reader.fill)

    cfg = families.from_hf(safetensors.read_config(directory))
    tokenizer = read_tokenizer(directory, cfg)
    run = make_run(cfg, directory.absolute())
    return Trained(run, tokenizer, Unread(opened), 0)
