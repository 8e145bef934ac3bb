"""Hugging Face directories from Python: `save` variables to one, `load` one.

A directory is what `from_pretrained` and vLLM read: config.json, one or several
safetensors files and, with several, their index.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jmoe.checkpoint import manifest, unread
from jmoe.checkpoint.unread import Slices
from jmoe.config import ModelConfig
from jmoe.data.tokenizer import Tokenizer
from jmoe.export import export_run, sources, work, write
from jmoe.export.read import Leaf, Reader


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
      tokenizer: a tokenizer.json to put beside them, with what belongs to it.
      shard_bytes: about how large a file may be.

    Raises:
      ValueError: `path` exists, or the variables aren't those of `cfg` or not finite.
    """
    beside = None if tokenizer is None else Tokenizer.from_file(tokenizer)
    source = sources.InMemory(variables)
    dtype = "fp8" if fp8 else None
    made = export_run.make_plan(cfg, source, dtype=dtype, shard_bytes=shard_bytes)
    export_run.write_directory(
        pathlib.Path(path), cfg, made, source, beside, lambda _: None
    )


def load(
    path: str | pathlib.Path,
    *,
    dtype: str | None = None,
    fp8: str = "dequantize",
    shardings: Any = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads the directory `path`, onto any devices.

    Args:
      dtype: "float32" or "bfloat16"; None: each array as its file has it, and FP8
        weights as the config's `torch_dtype` once they are dequantized. Selection
        biases are float32 always.
      fp8: "dequantize", or "keep": FP8 weights become e4m3 arrays, and the collection
        `fp8_scales` gets their block scales. `Transformer` takes no such variables;
        `save` writes them as they were.
      shardings: a pytree of `jax.sharding.Sharding`, one for each variable; None: the
        default device. A process reads the bytes of the shards that it holds. Scales
        without a sharding of their own are where their weights are, replicated.

    Returns:
      The configuration, and the variables that `Transformer(cfg).apply` takes.

    Raises:
      FileNotFoundError, ValueError: `path` isn't a whole checkpoint that jmoe reads, or
        its weights aren't finite.
    """
    with opened(path, dtype=dtype, fp8=fp8) as reader:
        placed = _placed(reader, shardings)
        with concurrent.futures.ThreadPoolExecutor(work.THREADS) as pool:
            arrays = {
                name: unread.put(
                    leaf.shape,
                    leaf.dtype,
                    placed[name],
                    functools.partial(_read, reader, pool, name),
                )
                for name, leaf in reader.leaves.items()
            }
    return reader.cfg, _nested(arrays)


@contextlib.contextmanager
def opened(
    path: str | pathlib.Path, *, dtype: str | None = None, fp8: str = "dequantize"
) -> Iterator[Reader]:
    """Gives what reads the directory, whose copies of weights process 0 has compared.

    Args, and what is raised, are those of `load`.
    """
    with Reader(pathlib.Path(path), fp8=fp8, dtype=dtype) as reader:
        if jax.process_index() == 0:
            reader.check_copies()
        yield reader


def _placed(reader: Reader, shardings: Any) -> dict[str, jax.sharding.Sharding]:
    """Returns where each leaf goes."""
    if shardings is None:
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(reader.leaves, default)
    given = manifest.flatten(shardings)
    for path in reader.leaves.keys() - given.keys():
        weight = f"params/{path.partition('/')[2]}"
        if not path.startswith(sources.SCALES) or weight not in given:
            raise ValueError(f"shardings has none for {path}.")
        given[path] = given[weight]
        if isinstance(given[weight], jax.sharding.NamedSharding):
            replicated = jax.sharding.PartitionSpec()
            given[path] = jax.sharding.NamedSharding(given[weight].mesh, replicated)
    return given


def _read(
    reader: Reader, pool: concurrent.futures.Executor, path: str, whole: Slices
) -> np.ndarray:
    """Returns a device's part of a leaf, layers and experts read side by side."""
    leaf = reader.leaves[path]
    out = np.empty([part.stop - part.start for part in whole], leaf.dtype)

    def fill(lead: Slices) -> None:
        begin = [part.start for part in whole]
        place = tuple(
            slice(p.start - b, p.stop - b) for p, b in zip(lead, begin, strict=False)
        )
        reader.fill(out[place], path, (*lead, *whole[len(lead) :]))

    list(pool.map(fill, _leads(leaf, whole)))
    return out


def _leads(leaf: Leaf, whole: Slices) -> Iterator[Slices]:
    """Yields the part's layers and experts one by one."""
    lead = whole[: leaf.num_lead]
    ranges = (range(part.start, part.stop) for part in lead)
    for place in itertools.product(*ranges):
        yield tuple(slice(at, at + 1) for at in place)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"params/head": x} as {"params": {"head": x}}."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested
