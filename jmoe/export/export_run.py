"""A run's checkpoint as a directory that transformers and vLLM load."""

import concurrent.futures
import json
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jmoe import families
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.pieces import Pieces
from jmoe.checkpoint.retention import Which
from jmoe.checkpoint.store import Store
from jmoe.config import ModelConfig
from jmoe.data.tokenizer import Tokenizer
from jmoe.export import card, layout, names, safetensors, sources, write
from jmoe.export.files import Directory
from jmoe.export.numerics import FLOAT8
from jmoe.export.sources import Source
from jmoe.export.write import Advance, Plan
from jmoe.monitor import run_files
from jmoe.train.trained import CHECKPOINTS, TOKENIZER

Started = Callable[[int], Advance]  # is told how many bytes will be written


def export_run(
    workdir: pathlib.Path,
    out: pathlib.Path,
    *,
    started: Started,
    step: Which = None,
    dtype: str | None = None,
    shard_bytes: int = write.SHARD_BYTES,
) -> Plan:
    """Writes a run's newest whole checkpoint, that of `step`, or the best.

    Args:
      started: gets the number of bytes, returns what is told of progress.
      dtype: "float32", "bfloat16", "fp8", or None: as the checkpoint has them.

    Raises:
      FileNotFoundError: `workdir` holds no run, no tokenizer, or no such checkpoint.
      ValueError: a file of the run is damaged, or its weights aren't finite; `out`
        exists.
      OSError: the disk is full. What was finished is in `OUT.partial`, and the same
        call goes on from it.
    """
    if not (workdir / workdirs.CONFIG).is_file():
        raise FileNotFoundError(
            f"workdir={str(workdir)!r} holds no run: it has no {workdirs.CONFIG}."
        )
    cfg = workdirs.read_run(workdir).model
    tokenizer = Tokenizer.from_file(workdir / TOKENIZER)
    with Store(workdir / CHECKPOINTS) as store:
        checkpoint = store.locate(step)
    source = sources.Stored(Pieces(checkpoint))
    made = make_plan(cfg, source, dtype=dtype, shard_bytes=shard_bytes)
    written_as = " and ".join(sorted({str(found) for found in made.dtypes.values()}))
    text = card.model_card(
        cfg, run_files.read_run(workdir), int(checkpoint.name), written_as=written_as
    )
    progress = started(made.size)
    write_directory(out, cfg, made, source, tokenizer, progress, {card.CARD: text})
    return made


def make_plan(
    cfg: ModelConfig, source: Source, *, dtype: str | None, shard_bytes: int
) -> Plan:
    """Returns the files of `source`'s weights, once they are known to be `cfg`'s.

    Raises:
      ValueError: files of its family can't describe the model; leaves are missing,
        unexpected or of another shape (names all), or would be lost.
    """
    tensors = names.expand(cfg)
    _check_leaves(names.abstract_leaves(cfg), source)
    _check_lost(cfg, source)
    return write.plan(tensors, source.dtypes, dtype=dtype, shard_bytes=shard_bytes)


def write_directory(
    out: pathlib.Path,
    cfg: ModelConfig,
    made: Plan,
    source: Source,
    tokenizer: Tokenizer | None,
    progress: Advance,
    texts: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Writes all files, those in `texts` as they are, then the directory's name.

    The weights are compared with their sums meanwhile, which reads them into the page
    cache for the conversion too.
    """
    with Directory(out, write.identity(made, source)) as directory:
        directory.require_room(made.size)
        with concurrent.futures.ThreadPoolExecutor(1) as aside:
            checked = aside.submit(source.check)
            try:
                write.write(directory, made, source, progress)
            finally:  # of damaged weights, no other error is true
                checked.result()
        if len(made.shards) > 1:
            directory.write_text(layout.INDEX, layout.index_json(made.shards))
        embedding, _ = families.family_of(cfg).names.model["embedding"]
        config = card.config_json(
            cfg,
            dtype=str(made.dtypes[embedding]),
            is_fp8=FLOAT8 in made.dtypes.values(),
            tokenizer=tokenizer,
        )
        files = {safetensors.CONFIG: config, **texts}
        if tokenizer is not None:
            files |= card.tokenizer_files(tokenizer, cfg.max_positions)
        for name, content in files.items():
            if isinstance(content, dict):
                content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            if isinstance(content, str):
                content = content.encode()
            directory.write_bytes(name, content)
        directory.publish()


def _check_leaves(abstract: Mapping[str, Any], source: Source) -> None:
    expected = {path: tuple(leaf.shape) for path, leaf in abstract.items()}
    found = {
        path: shape
        for path, shape in source.shapes.items()
        if not path.startswith(sources.SCALES)
    }
    wrong = [
        f"  {path}: expected {expected.get(path, 'nothing')}, "
        f"found {found.get(path, 'nothing')}"
        for path in sorted({*expected, *found})
        if expected.get(path) != found.get(path)
    ]
    if wrong:
        raise ValueError("\n".join(["The variables are not the model's:", *wrong]))


def _check_lost(cfg: ModelConfig, source: Source) -> None:
    """Raises ValueError unless what the family's files don't have is zero."""
    for path in names.absent(cfg):
        if np.any(source.read(path, ())):
            raise ValueError(
                f"{source.name}: {path} isn't zero, and the files of "
                f"family={cfg.family!r} have no selection biases. Train without "
                "(train.bias_rate.first=0 and .last=0), or choose a family that has "
                "them: model.family in the run's config.json may be changed."
            )
