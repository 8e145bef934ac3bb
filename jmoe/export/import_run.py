"""A Hugging Face directory as a run: scripts train, sample and export it.

The run's checkpoint, of step 0, has weights and selection biases and no optimizer
state. Its arrays are written chunk by chunk, several at once: what is in memory is a
few chunks, whatever the size of the model.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jmoe.checkpoint import adopt
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.unread import Slices
from jmoe.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    StepwiseConfig,
    TrainConfig,
    override,
    to_dict,
)
from jmoe.data.special_tokens import GENERATION
from jmoe.data.tokenizer import Tokenizer
from jmoe.export import layout, names, work
from jmoe.export.files import Buffers, Directory
from jmoe.export.read import Leaf, Reader
from jmoe.export.work import Budget
from jmoe.export.write import Advance
from jmoe.train.trained import CHECKPOINTS, TOKENIZER

ARRAYS = "arrays"  # where chunks wait until all are there

Started = Callable[[int], Advance]  # is told how many bytes will be written


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A file of the checkpoint, and the part of the leaf that it holds."""

    file: str
    path: str
    index: Slices
    nbytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.index)


def import_run(
    model: pathlib.Path,
    workdir: pathlib.Path,
    *,
    started: Started,
    assignments: Sequence[str] = (),
    dtype: str | None = None,
    fp8: str = "dequantize",
) -> RunConfig:
    """Makes the new directory `workdir` a run of the model in the directory `model`.

    Args:
      started: gets the number of bytes, returns what is told of progress.
      assignments: `path.to.field=value`, over the run's defaults.
      dtype: of the checkpoint; None: each array as the files have it.
      fp8: what becomes of FP8 weights: "dequantize" or "keep".

    Raises:
      FileNotFoundError, ValueError: `model` isn't a whole checkpoint that jmoe reads,
        has no tokenizer, or weights that aren't finite; `workdir` exists. Nothing was
        written.
      OSError: the disk is full. What was finished is in `WORKDIR.partial`, and the same
        call goes on from it.
    """
    with Reader(model, fp8=fp8, dtype=dtype) as reader:
        tokenizer = read_tokenizer(model, reader.cfg)
        run = make_run(reader.cfg, workdir, assignments)
        with Directory(workdir, _identity(reader)) as directory:
            arrays = _write_arrays(directory, reader, started)
            # Of an attempt that ended in the middle of what follows:
            checkpoints = directory.partial / CHECKPOINTS
            shutil.rmtree(checkpoints, ignore_errors=True)
            adopt.adopt(checkpoints, 0, arrays, position={})
            shutil.rmtree(directory.partial / ARRAYS)
            for name, content in tokenizer.files.items():
                directory.write_bytes(name, content)
            record = json.dumps(to_dict(run), indent=2)
            directory.write_text(workdirs.CONFIG, record)
            directory.publish()
    return run


def make_run(
    cfg: ModelConfig, workdir: pathlib.Path, assignments: Sequence[str] = ()
) -> RunConfig:
    """Returns the run's record: the model's, and defaults that `assignments` change.

    Raises:
      ValueError: an assignment is malformed, or would make it another model.
    """
    train = TrainConfig(steps=1000, batch_size=16, microbatch_size=16)
    if names.absent(cfg):  # biases that have moved could not go out again
        still = StepwiseConfig(first=0.0, last=0.0)
        train = dataclasses.replace(train, bias_rate=still)
    run = RunConfig(
        name=workdir.name,
        model=cfg,
        data=DataConfig(
            tokenizer=str(workdir / TOKENIZER),
            sequence_length=min(256, cfg.max_positions),
        ),
        train=train,
        initial_weights="imported",
    )
    made = override(run, assignments)
    for name, (old, new) in workdirs.fixed_changes(run, made, ("model",)).items():
        raise ValueError(f"{name}={new!r} must stay {old!r}, as the files have it.")
    return made


def read_tokenizer(model: pathlib.Path, cfg: ModelConfig) -> Tokenizer:
    """Returns a directory's tokenizer, with what its files say of special tokens.

    Raises:
      FileNotFoundError: it has none.
      ValueError: it isn't one that jmoe reads, or has more tokens than the model.
    """
    tokenizer = Tokenizer.from_file(model / TOKENIZER, _said_by(cfg))
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"{model / TOKENIZER} has {tokenizer.vocab_size} tokens, more than the "
            f"model's vocab_size={cfg.vocab_size}."
        )
    return tokenizer


def _said_by(cfg: ModelConfig) -> dict[str, bytes]:
    """Returns generation_config.json as transformers makes it of config.json alone."""
    said = json.loads(cfg.hf_extras)
    ids = {key: said[key] for key in ("bos_token_id", "eos_token_id") if key in said}
    if ids.get("eos_token_id") is None:
        return {}
    return {GENERATION: json.dumps({"_from_model_config": True} | ids).encode()}


def chunks(path: str, leaf: Leaf) -> Iterator[Chunk]:
    """Yields the leaf's files: one if it is small, else of a layer's (some) experts."""
    shape = chunk_shape(leaf)
    counts = [size // part for size, part in zip(leaf.shape, shape, strict=True)]
    for place in itertools.product(*map(range, counts)):
        starts = [at * part for at, part in zip(place, shape, strict=True)]
        yield Chunk(
            file=f"{ARRAYS}/{path}/{'.'.join(map(str, place))}",
            path=path,
            index=tuple(slice(s, s + n) for s, n in zip(starts, shape, strict=True)),
            nbytes=math.prod(shape) * leaf.dtype.itemsize,
        )


def chunk_shape(leaf: Leaf) -> tuple[int, ...]:
    """Divides the leaf's shape by layers, then by experts, to `layout.UNIT_BYTES`."""
    shape = list(leaf.shape)
    for axis in range(leaf.num_lead):
        rest = math.prod(shape) * leaf.dtype.itemsize // shape[axis]
        fitting = [
            n
            for n in range(1, shape[axis] + 1)
            if shape[axis] % n == 0 and n * rest <= layout.UNIT_BYTES
        ]
        shape[axis] = max(fitting, default=1)
    return tuple(shape)


def _write_arrays(
    directory: Directory, reader: Reader, started: Started
) -> dict[str, adopt.Array]:
    """Writes every leaf as a directory of chunks.

    MTP's copies are compared meanwhile.
    """
    plan = {path: list(chunks(path, leaf)) for path, leaf in reader.leaves.items()}
    every = list(itertools.chain(*plan.values()))
    total = sum(chunk.nbytes for chunk in every)
    directory.require_room(total)
    with concurrent.futures.ThreadPoolExecutor(1) as aside:
        checked = aside.submit(reader.check_copies)
        _write_chunks(directory, reader, every, started(total))
        checked.result()
    return {
        path: _describe(directory, path, leaf, plan[path])
        for path, leaf in reader.leaves.items()
    }


def _write_chunks(
    directory: Directory,
    reader: Reader,
    every: Sequence[Chunk],
    progress: Advance,
) -> None:
    buffers, budget = Buffers(), Budget()

    def one(chunk: Chunk) -> None:
        if not directory.has(chunk.file, chunk.nbytes):
            with budget.hold(2 * chunk.nbytes):
                _write_chunk(directory, reader, chunk, buffers)
        progress(chunk.nbytes)

    with concurrent.futures.ThreadPoolExecutor(work.THREADS) as pool:
        work.each(pool, one, every)


def _write_chunk(
    directory: Directory, reader: Reader, chunk: Chunk, buffers: Buffers
) -> None:
    data = buffers.get(chunk.nbytes, 0)
    dtype = reader.leaves[chunk.path].dtype
    out = np.frombuffer(data, dtype).reshape(chunk.shape)
    reader.fill(out, chunk.path, chunk.index)
    with directory.writing(chunk.file, chunk.nbytes) as file:
        file.write(0, data)


def _describe(
    directory: Directory, path: str, leaf: Leaf, own: Sequence[Chunk]
) -> adopt.Array:
    """Describes the leaf as a directory that is an array."""
    where = f"{ARRAYS}/{path}"
    text = adopt.description(leaf.shape, chunk_shape(leaf), leaf.dtype)
    directory.write_text(f"{where}/{adopt.DESCRIPTION}", text)
    sums = {}
    for chunk in own:
        ((_, nbytes, crc),) = directory.sums(chunk.file)
        sums[pathlib.PurePath(chunk.file).name] = (nbytes, crc)
    return adopt.Array(directory.partial / where, leaf.shape, leaf.dtype, sums)


def _identity(reader: Reader) -> str:
    """Changes with the files read and with what is made of them."""
    files = sorted({found.file for found in reader.found.values()})
    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    made = [(path, leaf.shape, str(leaf.dtype)) for path, leaf in reader.leaves.items()]
    return hashlib.sha256(
        repr((stats, sorted(reader.found), made)).encode()
    ).hexdigest()
