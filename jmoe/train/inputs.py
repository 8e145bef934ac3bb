"""What a run reads: its tokenizer, its batches, and the text held out from them.

Of several processes, process 0 prepares what isn't cached yet, and the others find it;
each then reads its own part of every batch.

Shapes: A microbatch, B sequence, T position, V token.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jmoe.config import RunConfig
from jmoe.data.loader import Loader, make_loader, validation_batches
from jmoe.data.packing import Batch
from jmoe.data.tokenizer import Tokenizer, load_tokenizer
from jmoe.parallel import processes
from jmoe.parallel.mesh import batch_part
from jmoe.train.trained import TOKENIZER


class Inputs(NamedTuple):
    """This process's data. num_parts: how many parts the batches have."""

    tokenizer: Tokenizer
    loader: Loader
    held_out: list[Batch]
    entropy: float
    num_parts: int


def open_inputs(run: RunConfig, mesh: Mesh, workdir: pathlib.Path | None) -> Inputs:
    """Opens a run's data.

    Args:
      workdir: of a run that goes on, with its own copy of the tokenizer.

    Raises:
      FileNotFoundError, ValueError: a mistake in the data or how it is asked for, or
        processes that found different data.
    """
    part, num_parts = batch_part(mesh)
    with processes.first_before_others("data"):
        tokenizer = _load_tokenizer(run, workdir)
        loader = make_loader(
            run.data,
            tokenizer,
            batch_size=run.train.microbatch_size,
            process_index=part,
            process_count=num_parts,
        )
        held_out = validation_batches(
            run.data,
            tokenizer,
            batch_size=run.train.microbatch_size,
            num_batches=run.train.eval_batches,
            process_index=part,
            process_count=num_parts,
        )
    found = {"tokenizer": tokenizer.fingerprint, "text": loader.get_state()["data"]}
    processes.agree({"data": found, "workdir has a run": workdir is not None})
    entropy = unigram_entropy(held_out, part)
    return Inputs(tokenizer, loader, held_out, entropy, num_parts)


def next_batch(loader: Loader, count: int) -> Batch:
    """Returns `count` microbatches, [A, B, T + 1]."""
    return jax.tree.map(lambda *x: np.stack(x), *(next(loader) for _ in range(count)))


def unigram_entropy(batches: Sequence[Batch], part: int = 0) -> float:
    """Returns nats a token of the targets' best predictor that ignores context.

    Args:
      part: which part of the batches this is, where several processes have one each.
    """
    count_V = np.bincount(np.concatenate([b.tokens_BT[:, 1:].ravel() for b in batches]))
    parts = dict(processes.exchange("targets", [part, count_V.tolist()]))
    count_V = np.zeros(max(map(len, parts.values())), np.int64)
    for counts in parts.values():
        count_V[: len(counts)] += counts
    share_V = count_V[count_V > 0] / count_V.sum()
    return float(-(share_V * np.log(share_V)).sum())


def _load_tokenizer(run: RunConfig, workdir: pathlib.Path | None) -> Tokenizer:
    """Returns a run's own copy where it goes on, whatever became of the original."""
    if workdir is not None and (workdir / TOKENIZER).exists():
        return Tokenizer.from_file(workdir / TOKENIZER)
    return load_tokenizer(run.data, run.model.vocab_size)
