"""The sides of the conversion benchmark, each in a process of its own.

All of them work in one directory: `run` is exported to `hf`, `hf` is imported as
`imported` and copied as `copied`. What a side writes, it removes before its next turn.
"""

import mmap
import os
import pathlib
import resource
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import convert
from experiments.benchmarks.workers import Tasks
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.store import Store
from jmoe.config import DataConfig, ModelConfig, RunConfig, TrainConfig, override
from jmoe.data.tokenizer import train_bpe
from jmoe.export import names
from jmoe.export.export_run import export_run
from jmoe.export.import_run import import_run
from jmoe.nn.model import abstract_variables
from jmoe.train.trained import CHECKPOINTS, TOKENIZER

_DIRECT_BYTES = 16 << 20


def make(directory: pathlib.Path) -> Tasks:
    """`make`: writes the run, and returns its size and that of its largest layer."""

    def task() -> dict[str, int]:
        cfg = override(ModelConfig.preset(convert.MODEL), convert.CHANGES)
        run = RunConfig(
            name="convert",
            model=cfg,
            data=DataConfig(sequence_length=256),
            train=TrainConfig(steps=1, batch_size=1, microbatch_size=1),
        )
        workdirs.open_run(directory / "run", run)
        train_bpe(["text " * 9], 300).save(str(directory / "run" / TOKENIZER))
        rng = np.random.default_rng(0)
        variables = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)),
            abstract_variables(cfg),
        )
        with Store(directory / "run" / CHECKPOINTS) as store:
            store.save(1, variables, {})
        return {"checkpoint_bytes": _nbytes(variables), "layer_bytes": _layer(cfg)}

    return {"make": task}


def exporting(directory: pathlib.Path) -> Tasks:
    """`export`, and the same as `bfloat16` and `fp8`."""

    def task(dtype: str | None, name: str) -> Callable[[], dict[str, Any]]:
        def export(source: pathlib.Path, out: pathlib.Path) -> None:
            export_run(
                source,
                out,
                dtype=dtype,
                shard_bytes=convert.SHARD_BYTES,
                started=lambda total: lambda nbytes: None,
            )

        return _timed(export, directory / "run", directory / name, counts="out")

    return {
        "export": task(None, "hf"),
        "bfloat16": task("bfloat16", "bfloat16"),
        "fp8": task("fp8", "fp8"),
    }


def importing(directory: pathlib.Path) -> Tasks:
    """`import`."""

    def task(source: pathlib.Path, out: pathlib.Path) -> None:
        import_run(source, out, started=lambda total: lambda nbytes: None)

    return {"import": _timed(task, directory / "hf", directory / "imported")}


def copying(directory: pathlib.Path) -> Tasks:
    """`copy`, and `direct_copy`, which goes past the page cache."""

    def plain(source: pathlib.Path, out: pathlib.Path) -> None:
        out.mkdir()
        for path in source.iterdir():
            shutil.copyfile(path, out / path.name)
        for path in out.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def direct(source: pathlib.Path, out: pathlib.Path) -> None:
        out.mkdir()
        for path in source.iterdir():
            _copy_directly(path, out / path.name)

    places = directory / "hf", directory / "copied"
    return {"copy": _timed(plain, *places), "direct_copy": _timed(direct, *places)}


def _copy_directly(source: pathlib.Path, target: pathlib.Path) -> None:
    """In large pieces, read and written without the page cache."""
    size = source.stat().st_size
    reading = os.open(source, os.O_RDONLY | os.O_DIRECT)
    writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
    os.posix_fallocate(writing, 0, size)
    buffer = memoryview(mmap.mmap(-1, _DIRECT_BYTES))
    for offset in range(0, size, _DIRECT_BYTES):
        os.preadv(reading, [buffer], offset)
        os.pwrite(writing, buffer, offset)
    os.ftruncate(writing, size)  # the last piece was a whole one
    os.fsync(writing)
    os.close(reading)
    os.close(writing)


def _timed(
    convert: Callable[[pathlib.Path, pathlib.Path], None],
    source: pathlib.Path,
    out: pathlib.Path,
    counts: str = "source",
) -> Callable[[], dict[str, Any]]:
    """A turn: `out` is removed and `source` not cached; returns seconds and bytes."""
    idle_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def turn() -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        uncache(source)
        start = time.perf_counter()
        convert(source, out)
        seconds = time.perf_counter() - start
        counted = out if counts == "out" else source
        size = sum(path.stat().st_size for path in _files(counted))
        return {"seconds": seconds, "bytes": size, "idle_bytes": idle_bytes}

    return turn


def uncache(directory: pathlib.Path) -> None:
    """Brings what is in the directory's files to the disk, and out of memory."""
    for path in _files(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _nbytes(variables: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(variables))


def _layer(cfg: ModelConfig) -> int:
    """Bytes of the largest layer's float32 parameters."""
    sizes: dict[str, int] = {}
    for tensor in names.expand(cfg):
        layer = ".".join(tensor.name.split(".")[:3])
        if layer.startswith("model.layers") and not tensor.is_copy:
            sizes[layer] = sizes.get(layer, 0) + 4 * tensor.size
    return max(sizes.values())
