"""A byte-level BPE trained on the sources, or the user's own tokenizer.json.

The trained one splits text before merging, in the manner of DeepSeek-V3 (arXiv
2412.19437, section 4.1): letters with the blank or mark before them, punctuation with
the line ends after it, runs of white space. Digits stand alone, so that arithmetic
sees numbers place by place. All 256 bytes are in the vocabulary: any text can be
encoded, and decodes to itself.

A user's tokenizer may be one that has no token for some text and drops it. What would
be lost is refused, whatever the tokenizer is made of.
"""

import functools
import heapq
import itertools
import pathlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jmoe.config import checks
from jmoe.config.data import DataConfig
from jmoe.data import cache, durable, readers, special_tokens, text, token_bytes

FILE = "tokenizer.json"
SAMPLE_CHARACTERS = 6_000_000  # enough for a vocabulary of tens of thousands
_SHOWN = 40  # characters in a message
_RECIPE = 2  # raise it when training changes, so that no old result is reused

# A run longer than this is cut. Merging costs the square of a piece's length, and some
# documents are one word, such as a genome; no word of a language is as long.
PIECE_CHARACTERS = 256
_RUN = f"{{1,{PIECE_CHARACTERS}}}"
_ANY_RUN = f"{{0,{PIECE_CHARACTERS}}}"
_PIECES = (
    r"\p{N}",
    rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}[\p{{L}}\p{{M}}]{_ANY_RUN}",
    rf" ?[^\s\p{{L}}\p{{N}}]{_RUN}[\r\n]{_ANY_RUN}",
    rf"\s{_ANY_RUN}[\r\n]{_RUN}",
    rf"\s{_RUN}(?!\S)",
    rf"\s{_RUN}",
)


class Tokenizer:
    """Text to token ids and back, with one token that separates documents.

    eos_id separates documents; separator is what stands before each, which has what
    opens a text as well where that is another token. opening and stop_ids: what a text
    to go on from begins with, and where its continuation ends. files: the bytes of
    tokenizer.json and of what belongs to it, by name; tokenizer.json comes last.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_id: int,
        *,
        opening: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
        files: Mapping[str, bytes] | None = None,
    ):
        self.files = dict(files or {FILE: backend.to_str(pretty=True).encode()})
        # Text that spells a special token is text: only we place separators.
        backend.encode_special_tokens = True
        # What another program left in the file would cut or fill every document.
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        self._backend = backend
        self.eos_id = eos_id
        self.opening = (eos_id,) if opening is None else tuple(opening)
        self.separator = (eos_id, *(x for x in self.opening if x != eos_id))
        self.stop_ids = tuple(stop_ids) or (eos_id,)
        self.vocab_size = max(backend.get_vocab().values()) + 1

    @classmethod
    def from_file(
        cls,
        path: str | pathlib.Path,
        otherwise: Mapping[str, bytes] = types.MappingProxyType({}),
    ) -> Self:
        """Reads a tokenizer.json, and what the files beside it say of its tokens.

        Args:
          otherwise: files to go by where there are none of these names beside it.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not a tokenizer, one without an end-of-text token, or a file
            beside it that doesn't fit.
        """
        path = checks.local_path("tokenizer", str(path))
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer={str(path)!r}: no such file.")
        content = path.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"tokenizer={str(path)!r} is not a tokenizer.json: {error}."
            ) from error
        sidecars = {**otherwise, **special_tokens.read_sidecars(path.parent)}
        try:
            found = special_tokens.find(backend, sidecars)
        except ValueError as error:
            raise ValueError(f"tokenizer={str(path)!r}: beside it, {error}") from error
        if found is None:
            raise ValueError(
                f"tokenizer={str(path)!r} has none of the tokens that may end "
                f"a document: {', '.join(special_tokens.END_OF_TEXT)}."
            )
        return cls(
            backend,
            found.eos,
            opening=found.opening,
            stop_ids=found.stops,
            files={**sidecars, FILE: content},
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A key to what this tokenizer does."""
        guessed = special_tokens.guessed(self._backend)
        told = self.separator if self.separator != (guessed,) else ()
        return cache.key(self._backend.to_str(), *told)

    def encode(self, document: str) -> list[int]:
        """Returns token ids, with no separator before or after.

        Raises:
          ValueError: a part of the document has no token.
        """
        return self.encode_batch([document])[0]

    def encode_batch(self, documents: Sequence[str]) -> list[list[int]]:
        """Encodes each as `encode` does, in parallel."""
        try:
            encoded = self._backend.encode_batch_fast(
                list(documents), add_special_tokens=False
            )
        except Exception as error:  # of a model without a token for the unknown
            raise ValueError(f"The tokenizer fails at a document: {error}.") from error
        ids = [encoding.ids for encoding in encoded]
        texts = self._backend.decode_batch(ids, skip_special_tokens=False)
        for document, back in zip(documents, texts, strict=True):
            if back != document:
                self._refuse_loss(document)
        return ids

    def prompt(self, text: str) -> list[int]:
        """Returns the ids of a text to go on from: at least one."""
        return [*self.opening, *self.encode(text)] or [self.eos_id]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Returns the text, separators spelled out.

        Ids beyond the vocabulary vanish.
        """
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    @functools.cached_property
    def token_bytes(self) -> token_bytes.TokenBytes:
        """Tells the bytes of a token, which may be part of a character."""
        return token_bytes.TokenBytes(self._backend)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a tokenizer.json, without what belongs to it."""
        durable.write_bytes(pathlib.Path(path), self.files[FILE])

    def backend_json(self) -> str:
        """Returns a tokenizer.json that encodes as this one does."""
        return self._backend.to_str()

    def _refuse_loss(self, document: str) -> None:
        """Raises ValueError if some characters have no token.

        Blanks may have none, and what the tokenizer's own normalizer changes or drops
        it means to.
        """
        if self._backend.normalizer is not None:
            document = self._backend.normalizer.normalize_str(document)
        covered = bytearray(len(document))
        encoding = self._backend.encode(document, add_special_tokens=False)
        for start, end in encoding.offsets:
            covered[start:end] = bytes(b"\1" * (end - start))
        kept = bytes(covered)
        for at, character in enumerate(document):
            if kept[at] or character.isspace():
                continue
            end = kept.find(1, at)
            lost = document[at : end if end >= 0 else len(document)].rstrip()[:_SHOWN]
            around = document[max(0, at - _SHOWN) : at + _SHOWN]
            raise ValueError(
                f"The tokenizer has no token for {lost!r}, which would be lost, in "
                f"{around!r}; give it one for the unknown, or all bytes."
            )


def load_tokenizer(cfg: DataConfig, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a run, trained now if it has to be.

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
    """Trains a byte-level BPE of at most `vocab_size` tokens, the separator being 0."""
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
    """Returns the cached tokenizer.json for these sources and this size."""
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
        trained = train_bpe(sample, vocab_size).to_str(pretty=True)
        durable.write_text(directory / FILE, trained)

    directory = cache.directory(cfg) / "tokenizers" / key
    return cache.made_once(directory, make, _flaw) / FILE


def _flaw(directory: pathlib.Path) -> str | None:
    try:
        Tokenizer.from_file(directory / FILE)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _sample(source: text.Text, num_characters: int) -> list[str]:
    """Returns documents of the highest hashes: a uniform sample, in whatever order.

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
