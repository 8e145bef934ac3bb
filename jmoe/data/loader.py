"""Batches of a mixture: shuffled, sharded over processes, resumable to the exact batch.

The order is a pure function of the configuration and a position, so resuming is a jump
and no data is read twice to get there:

  source i -> rows -> shuffled, differently in every epoch -> mixed by weight
           -> cut in batches -> this process's part of each -> read ahead in a thread

Shapes: see `jmoe.data.packing`.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jmoe.config.data import DataConfig
from jmoe.data import cache, corpus, text
from jmoe.data.packing import Batch, PackedRows, as_batch
from jmoe.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
_EPOCHS = 2**30  # for ever; Grain's endless `repeat` overflows in batches of one
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)  # batches


class Loader(Iterator[Batch]):
    """An endless iterator over this process's part of the global batches.

    The position counts sequences of the whole job, so that it holds for any number of
    processes. All batches have one size: a step that takes more, as in a batch-size
    ramp, draws several.
    """

    def __init__(self, batches: grain.MapDataset, batch_size: int, fingerprint: str):
        self._batches = batches
        self._batch_size = batch_size
        self._fingerprint = fingerprint
        self._go_to(0)

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._position += 1
        return batch

    def get_state(self) -> dict[str, int | str]:
        """Returns where the next batch begins, in JSON's types.

        It is the same on every process.
        """
        return {
            "sequences": self._position * self._batch_size,
            "data": self._fingerprint,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from where `get_state` was called.

        Raises:
          ValueError: the text, tokenizer, mixture, packing or seed is another one, or
            the position lies inside a batch of this size.
        """
        if state["data"] != self._fingerprint:
            raise ValueError(
                f"The saved position belongs to data {state['data']}, but this is "
                f"{self._fingerprint}: the text, tokenizer, weights, sequence_length, "
                "validation_fraction, seed or Python version has changed since."
            )
        position, inside = divmod(state["sequences"], self._batch_size)
        if inside:
            raise ValueError(
                f"The saved position, {state['sequences']} sequences, lies inside a "
                f"batch of batch_size={self._batch_size}; resume with one that "
                "divides it."
            )
        self.close()
        self._go_to(position)

    def close(self) -> None:
        """Ends the reading ahead."""
        self._iterator.close()

    def _go_to(self, position: int) -> None:
        self._position = position
        self._iterator = iter(self._batches[position:].to_iter_dataset(_READ_AHEAD))


def make_loader(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    split: str = "train",
) -> Loader:
    """Tokenises what isn't in the cache yet, and loads batches from there.

    Args:
      cfg: the sources, their mixture and the length of a row.
      tokenizer: from `load_tokenizer`.
      batch_size: sequences of a global batch, over all processes. Process i gets rows
        [i * b : (i + 1) * b] of it, b being `batch_size / process_count`.
      process_index: which process this is, from 0.
      process_count: how many there are.
      split: "train", or "validation" for the documents held out from every source.

    Raises:
      FileNotFoundError, ValueError: a bad source or a mistaken argument.
    """
    _check(batch_size, process_index, process_count, split)
    directory = cache.directory(cfg)
    corpora = [
        corpus.tokenize(source, tokenizer, directory)
        for source in text.open_sources(cfg)
    ]
    streams = [
        corpus.split(tokens, cfg.validation_fraction, cfg.sequence_length)[split]
        for tokens in corpora
    ]
    seed = cfg.seed if split == "train" else 0  # one validation set for all seeds
    weights = [source.weight for source in cfg.sources]
    rows = _mixture(streams, weights, cfg.sequence_length, seed)
    batches = rows.batch(batch_size // process_count)[process_index::process_count]
    fingerprint = cache.key(
        split,
        cfg.sequence_length,
        cfg.validation_fraction,
        seed,
        *weights,
        *(tokens.key for tokens in corpora),
    )
    return Loader(
        batches.map(functools.partial(as_batch, eos_id=tokenizer.eos_id)),
        batch_size,
        fingerprint,
    )


def validation_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    num_batches: int,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """Returns the first batches of the held-out documents, always the same ones.

    Sources are mixed as in training. Arguments and errors are those of `make_loader`.
    """
    loader = make_loader(
        cfg,
        tokenizer,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        split="validation",
    )
    batches = list(itertools.islice(loader, num_batches))
    loader.close()
    return batches


def _check(batch_size: int, process_index: int, process_count: int, split: str):
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must lie in [0, {process_count})."
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of "
            f"process_count={process_count}."
        )


def _mixture(
    streams: Sequence[np.ndarray],
    weights: Sequence[float],
    sequence_length: int,
    seed: int,
) -> grain.MapDataset:
    """Returns endless rows of all streams, each in its own order of every epoch.

    Grain takes the sources in turn, so that any stretch of rows has the shares that
    the weights ask for, to within a row and 1%.
    """
    children = np.random.SeedSequence(seed).spawn(len(streams))
    endless = [
        grain.MapDataset.source(PackedRows(stream_N, sequence_length))
        .shuffle(seed=int(child.generate_state(1)[0]))
        .repeat(_EPOCHS)
        for stream_N, child in zip(streams, children, strict=True)
    ]
    return grain.MapDataset.mix(endless, weights)
