"""What a completion's JSON body may ask for, checked before an engine sees it.

An engine parses the same bytes again. So nothing passes here that another parser could
read in another way: text that isn't UTF-8, a key given twice, NaN, "5" for 5.
"""

import json
import math
import re
import reprlib
from collections import Counter
from typing import Any, NoReturn

from jmoe.config.serve import LimitsConfig
from jmoe.serve.answers import Refused

MAX_DEPTH = 64  # of lists and objects within each other

# Fields of OpenAI's API and of vLLM's additions to it, by the limit that bounds them.
COUNTS = {
    "n": "choices",
    "best_of": "choices",
    "max_tokens": "new_tokens",
    "max_completion_tokens": "new_tokens",
    "min_tokens": "new_tokens",
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "prompt_logprobs": "logprobs",
}
LEAST = {"n": 1, "best_of": 1}  # 0 for the others
PROMPTS = ("prompt", "prompt_embeds")

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_BRACKET = re.compile(r"[\[\]{}]")


def check(body: bytes, limits: LimitsConfig) -> None:
    """Checks the body of a request for completions.

    Raises:
      Refused: with status 400 and one line, which names the field, its value and what
        is allowed.
    """
    parsed = _parse(body)
    _check_length("body", len(parsed), "items", limits)
    for field, value in parsed.items():
        if field in COUNTS:
            _check_count(field, value, COUNTS[field], limits)
        elif field in PROMPTS:
            _check_length(field, _num_prompts(value), "prompts", limits)
        elif field != "messages" and isinstance(value, list | dict):
            _check_length(field, len(value), "items", limits)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode()
        parsed = json.loads(
            text,
            parse_constant=_refuse_number,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise _mistake(
            f"The body must be UTF-8; it isn't at byte offset {error.start}."
        ) from error
    except ValueError as error:
        raise _mistake(f"The body is not JSON: JSON decode error, {error}.") from error
    except RecursionError as error:
        raise _too_deep() from error
    _check_depth(text)
    if not isinstance(parsed, dict):
        raise _mistake("The body must be a JSON object.")
    return parsed


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON's")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{reprlib.repr(text)} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{reprlib.repr(key)} is there twice")
    return found


def _num_prompts(value: Any) -> int:
    """Returns how many prompts: a list of numbers is the tokens of one."""
    if not isinstance(value, list) or all(isinstance(item, int) for item in value):
        return 1
    return len(value)


def _check_count(field: str, value: Any, limit: str, limits: LimitsConfig) -> None:
    if value is None or isinstance(value, bool):  # whether, and not how many
        return
    shown = f"{field}={reprlib.repr(value)}"
    if not isinstance(value, int):
        raise _mistake(f"{shown} must be a whole number.", field)
    low, high = LEAST.get(field, 0), getattr(limits, limit)
    if value < low:
        raise _mistake(f"{shown} must be at least {low}.", field)
    if high is not None and value > high:
        raise _mistake(f"{shown} must be at most {high} (limits.{limit}).", field)


def _check_length(field: str, length: int, limit: str, limits: LimitsConfig) -> None:
    high = getattr(limits, limit)
    if length > high:
        message = f"{reprlib.repr(field)} has {length} {limit}; at most {high} may be"
        raise _mistake(f"{message} asked for at once (limits.{limit}).", field)


def _too_deep() -> Refused:
    return _mistake(f"The body nests more than {MAX_DEPTH} levels deep.")


def _mistake(message: str, field: str | None = None) -> Refused:
    return Refused(400, message, field)
