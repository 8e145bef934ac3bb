"""Conversations as tokens, by the Jinja template that comes with a tokenizer.

A template is rendered in Jinja's sandbox, with the names that transformers gives it.
What it writes of special tokens becomes those tokens, and what clients write of them
stays text: nobody ends a message, or begins one of another role, from inside of it.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from jmoe.data.special_tokens import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from jmoe.data.tokenizer import Tokenizer
from jmoe.serve.answers import Refused

FILES = ("chat_template.jinja", "chat_template.json")

# Around special tokens' texts in what clients write; in no text that is exchanged.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARKS = str.maketrans("", "", _BEGIN + _END)


class Generation(jinja2.ext.Extension):
    """The tag that tells trainers what an assistant wrote; it changes no text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Makes tokens of conversations.

    Raises:
      ValueError: the template isn't one of Jinja's.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Encodes special tokens as such, which the other doesn't.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_json())
        self._backend.encode_special_tokens = False
        added = self._backend.get_added_tokens_decoder().items()
        self._ids = {token.content: id for id, token in added if token.special}
        longest_first = sorted(self._ids, key=len, reverse=True)
        special = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._special = re.compile(special)
        # One mark is enough: a template may have cut a text at the other.
        self._pieces = re.compile(f"{_BEGIN}?(?:{special}){_END}?")
        self._names = _names_of_tokens(tokenizer.files)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"The chat template is none of Jinja's: {error}."
            ) from None

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the prompt for the assistant's next message.

        Raises:
          Refused: the template refuses the conversation, or can't be rendered of it.
        """
        marked = [
            {key: self._marked(text) for key, text in message.items()}
            for message in messages
        ]
        try:
            text = self._template.render(
                messages=marked, add_generation_prompt=True, **self._names
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise Refused(
                400, f"The model's chat template says: {error}.", "messages"
            ) from error
        if _BEGIN not in text and _END not in text:
            return self._backend.encode(text, add_special_tokens=False).ids
        return list(self._mixed(text))

    def _marked(self, text: str) -> str:
        plain = text.translate(_MARKS)
        return self._special.sub(lambda found: f"{_BEGIN}{found[0]}{_END}", plain)

    def _mixed(self, text: str) -> Iterator[int]:
        """Yields the tokens of a text in which some special tokens are only text."""
        plain, at = "", 0
        for found in self._pieces.finditer(text):
            plain += text[at : found.start()]
            at = found.end()
            if found[0] not in self._ids:
                plain += found[0]
                continue
            yield from self._tokenizer.encode(plain.translate(_MARKS))
            plain = ""
            yield self._ids[found[0]]
        plain += text[at:]
        yield from self._tokenizer.encode(plain.translate(_MARKS))


def find_template(files: Mapping[str, bytes]) -> str | None:
    """Returns the template among a tokenizer's files, as transformers looks for it.

    Raises:
      ValueError: a file isn't what it should be.
    """
    jinja, as_json = FILES
    if jinja in files:
        return files[jinja].decode()
    for name in (as_json, TOKENIZER_CONFIG):
        found = _read(files, name).get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {x.get("name"): x.get("template") for x in found}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def _names_of_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns `bos_token` and its like."""
    found: dict[str, str] = {}
    for name in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        for key, token in _read(files, name).items():
            text = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}.") from error
    return found if isinstance(found, dict) else {}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON, in which Jinja's own filter would escape what HTML has."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(shape: str) -> str:
    return datetime.datetime.now().strftime(shape)
