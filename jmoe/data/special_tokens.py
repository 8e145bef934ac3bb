"""Where texts begin and end, as the files beside a tokenizer.json say.

A model that is published comes with these files, each written by another tool:
`tokenizer_config.json` and `special_tokens_map.json` name the tokens, and
`generation_config.json` has the ids at which a model stops. A tokenizer.json that lies
alone says nothing of it; then the first known name in its vocabulary has to do.
"""

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"

# What belongs to a tokenizer and to nothing else in a model's directory.
SIDECARS = (
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    GENERATION,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.json",
)

# How vocabularies in use call the token that ends a document.
END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
)


class SpecialTokens(NamedTuple):
    """The tokens around texts, by their ids.

    eos: ends a document. opening: what a text to go on from begins with. stops: where
    a continuation ends; `eos` is one of them.
    """

    eos: int
    opening: tuple[int, ...]
    stops: tuple[int, ...]


def read_sidecars(directory: pathlib.Path) -> dict[str, bytes]:
    """Returns the files that belong to a tokenizer.json, byte for byte."""
    paths = [directory / name for name in SIDECARS]
    paths += sorted((directory / TEMPLATES).glob("*.jinja"))
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in paths
        if path.is_file()
    }


def describe_tokens(names: Iterable[str]) -> bool:
    """Returns whether files of these names, beside a tokenizer.json, tell its tokens.

    A chat template doesn't: it says how messages are written, and may be put beside a
    tokenizer.json that lay alone.
    """
    return any("chat_template" not in name for name in names)


def guessed(backend: tokenizers.Tokenizer) -> int | None:
    """Returns the end of a text in a vocabulary that comes with no word about it."""
    ids = (backend.token_to_id(name) for name in END_OF_TEXT)
    return next((token for token in ids if token is not None), None)


def find(
    backend: tokenizers.Tokenizer, sidecars: Mapping[str, bytes]
) -> SpecialTokens | None:
    """Returns the special tokens that the sidecars say, or one that is guessed.

    What opens a text is the `bos_token` if `add_bos_token` is true, and else what the
    post-processor of tokenizer.json puts before it: often nothing.

    Raises:
      ValueError: a sidecar isn't JSON, names a token that the vocabulary lacks, or has
        an id that is no number.
    """
    config, names, generation = (
        _object(sidecars, name)
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION)
    )
    stops = _ids(generation.get("eos_token_id"))
    named = config.get("eos_token") or names.get("eos_token")
    if named:
        eos = _id(backend, named, "eos_token")
    else:
        eos = stops[0] if stops else guessed(backend)
    if eos is None:
        return None
    opening: tuple[int, ...] = (eos,)
    if describe_tokens(sidecars):
        bos = config.get("bos_token") or names.get("bos_token")
        if config.get("add_bos_token") and bos:
            opening = (_id(backend, bos, "bos_token"),)
        else:
            opening = tuple(_leading(json.loads(backend.to_str())["post_processor"]))
    return SpecialTokens(eos, opening, tuple(dict.fromkeys([*stops, eos])))


def _leading(processor: Mapping[str, Any] | None) -> Iterator[int]:
    """Yields the ids that a post-processor of tokenizer.json puts before a text."""
    if processor is None:
        return
    kind = processor["type"]
    if kind == "Sequence":
        for part in processor["processors"]:
            yield from _leading(part)
    elif kind == "TemplateProcessing":
        pieces = itertools.takewhile(lambda x: "SpecialToken" in x, processor["single"])
        for piece in pieces:
            yield from processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        yield processor["cls"][1]


def _id(backend: tokenizers.Tokenizer, token: Any, key: str) -> int:
    """Returns the id of a token, which is its text or an object that holds its text."""
    name = token.get("content") if isinstance(token, Mapping) else token
    found = backend.token_to_id(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"{key}={token!r} is not in the vocabulary.")
    return found


def _ids(given: Any) -> list[int]:
    """Returns the ids of one, of several, or of none."""
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(
            f"{GENERATION}: eos_token_id={given!r} must be a token's id or several."
        )
    return ids


def _object(sidecars: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(sidecars.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object.")
    return content
