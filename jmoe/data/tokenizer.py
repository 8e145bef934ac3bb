"""A byte-level BPE trained on the sources, or the user's own tokenizer.json.

The trained one splits text before merging, in the manner of DeepSeek-V3 (arXiv
2412.19437, section 4.1): letters with the blank or mark before them, punctuation with
the line ends after it, runs of white space. Digits stand alone, so that arithmetic
sees numbers place by place. All 256 bytes are in the vocabulary: any text can be
encoded, and decodes to itself.
"""

import functools
import heapq
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jmoe.config import checks
from jmoe.config.data import DataConfig
from jmoe.data import cache, readers, text

# How vocabularies in use call the token that ends a document.
END_OF_TEXT = (
    readers.SEPARATOR,
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
)
SAMPLE_CHARACTERS = 6_000_000  # enough for a vocabulary of tens of thousands
_RECIPE = 1  # raise it when training changes, so that no old result is reused

_PIECES = (
    r"\p{N}",
    r"[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{M}]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)


class Tokenizer:
    """Text to token ids and back, with one token that separates documents."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_id: int):
        # Text that spells a special token is text: only we place separators.
        backend.encode_special_tokens = True
        self._backend = backend
        self.eos_id = eos_id  # opens and closes documents
        self.vocab_size = max(backend.get_vocab().values()) + 1

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> Self:
        """Reads a tokenizer.json.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not a tokenizer, or one without an end-of-text token.
        """
        path = checks.local_path("tokenizer", str(path))
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer={str(path)!r}: no such file.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"tokenizer={str(path)!r} is not a tokenizer.json: {error}."
            ) from error
        ids = [backend.token_to_id(name) for name in END_OF_TEXT]
        found = [token for token in ids if token is not None]
        if not found:
            raise ValueError(
                f"tokenizer={str(path)!r} has none of the tokens that may end "
                f"a document: {', '.join(END_OF_TEXT)}."
            )
        return cls(backend, found[0])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A key to what this tokenizer does."""
        return cache.key(self._backend.to_str())

    def encode(self, document: str) -> list[int]:
        """Token ids, with no separator before or after."""
        return self._backend.encode(document, add_special_tokens=False).ids

    def encode_batch(self, documents: Sequence[str]) -> list[list[int]]:
        """`encode` of each, in parallel."""
        encoded = self._backend.encode_batch_fast(
            list(documents), add_special_tokens=False
        )
        return [encoding.ids for encoding in encoded]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text, separators spelled out; ids beyond the vocabulary vanish."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a tokenizer.json."""
        self._backend.save(str(path))


def load_tokenizer(cfg: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run, trained now if it has to be.

    Args:
      cfg: names the tokenizer, and the sources to train it on.
      vocab_size: the model's; a trained tokenizer has at most as many tokens.

    Raises:
      FileNotFoundError: the tokenizer or a source doesn't exist.
      ValueError: not a tokenizer, more tokens than `vocab_size`, or a bad source.
    """
    if cfg.tokenizer == "builtin":
        return Tokenizer.from_file(_trained(cfg, vocab_size))
    tokenizer = Tokenizer.from_file(cfg.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer={cfg.tokenizer!r} has {tokenizer.vocab_size} tokens, more "
            f"than the model's vocab_size={vocab_size}."
        )
    return tokenizer


def train_bpe(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, the separator being 0."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {smallest}: "
            f"every byte and {readers.SEPARATOR}."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex("|".join(_PIECES)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[readers.SEPARATOR],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return backend


def _trained(cfg: DataConfig, vocab_size: int) -> pathlib.Path:
    """The cached tokenizer.json for these sources and this size."""
    sources = text.open_sources(cfg)
    shares = [source.weight for source in cfg.sources]
    key = cache.key(
        _RECIPE, vocab_size, *shares, *(source.fingerprint for source in sources)
    )

    def make(directory: pathlib.Path) -> None:
        sample = itertools.chain.from_iterable(
            _sample(source, int(SAMPLE_CHARACTERS * share / sum(shares)))
            for source, share in zip(sources, shares, strict=True)
        )
        train_bpe(sample, vocab_size).save(str(directory / "tokenizer.json"))

    directory = cache.directory(cfg) / "tokenizers" / key
    return cache.made_once(directory, make, _flaw) / "tokenizer.json"


def _flaw(directory: pathlib.Path) -> str | None:
    try:
        Tokenizer.from_file(directory / "tokenizer.json")
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _sample(source: text.Text, num_characters: int) -> list[str]:
    """The documents of the highest hashes: a uniform sample, whatever their order.

    The lowest hashes are for validation, so the tokenizer doesn't see those documents
    unless the source is smaller than the sample.
    """
    kept, total = [], 0
    for document in source.documents():
        heapq.heappush(kept, (text.document_hash(document), document))
        total += len(document)
        while total > num_characters and len(kept) > 1:
            total -= len(heapq.heappop(kept)[1])
    return [document for _, document in sorted(kept)]
