"""Completes prompts, all at once, with an engine that is made for them."""

from collections.abc import Collection, Sequence
from typing import Any

from jmoe.config import ModelConfig
from jmoe.decode.engine import Engine, MakePrograms
from jmoe.decode.limits import Limits, few_parts
from jmoe.decode.programs import OneDevice
from jmoe.decode.requests import Sampling, check_prompt
from jmoe.train import compiled

PAGE_SIZE = 64  # and the step of a sequence's length, so that few programs are compiled
CHUNKS = 16, 128  # of which one is compiled
MOST_ROWS = 64  # that are decoded at once
FIRST_PROMPTS = 8  # that are read at once where none comes later


def generate(
    cfg: ModelConfig,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    drafts: int = 0,
    programs: MakePrograms = OneDevice,
) -> list[list[int]]:
    """Returns each prompt's new tokens, up to and without the first of `stop_ids`.

    Each power of two of prompts, and of pages of the longest, is a program of its own;
    all are freed when there are too many (`jmoe.train.compiled`). An `Engine` takes
    requests as they come, and keeps its programs.

    Args:
      variables: {"params": ..., "router_state": ...}.
      prompts: token ids; each at least one.
      temperature, top_p: see `jmoe.decode.sampling.Draws`.
      seed: of the first prompt's draws; each next prompt's is one more, so that equal
        prompts get texts of their own. What a prompt and its seed give depends on no
        other prompt.
      drafts: how many tokens the MTP module tries to foretell in a step. That changes
        no token: what is drawn follows from seed and position, and a draft that isn't
        what is drawn is discarded.
      programs: makes what runs steps; `jmoe.decode.on_mesh` has one for variables that
        are divided. All processes of a mesh call this function.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a negative or
        infinite temperature, top_p outside (0, 1], or more positions than there are.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt.")
    first = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=tuple(stop_ids),
    )
    for prompt in prompts:
        check_prompt(cfg, prompt, max_new_tokens, cfg.max_positions)
    longest = max(map(len, prompts))
    limits = fitting_limits(cfg, len(prompts), longest, max_new_tokens, drafts)
    compiled.make_room()
    engine = Engine(cfg, variables, limits, programs=programs)
    asked = ((prompt, first.further(i)) for i, prompt in enumerate(prompts))
    done = engine.complete(asked)
    tokens = {completion.number: completion.tokens for completion in done}
    return [tokens[number] for number in range(len(prompts))]


def fitting_limits(
    cfg: ModelConfig,
    num_prompts: int,
    longest: int,
    max_new_tokens: int,
    drafts: int = 0,
) -> Limits:
    """Returns limits for these prompts, of few different sizes.

    Args:
      longest: how many tokens the longest prompt has.
    """
    pages = _power_of_two(-(-(longest + max_new_tokens) // PAGE_SIZE))
    chunk = next((size for size in CHUNKS if size >= longest), CHUNKS[-1])
    # Then all are read in the first steps, and none is left to be read alone.
    is_read_at_once = longest <= chunk and num_prompts <= MOST_ROWS
    rows = min(_power_of_two(num_prompts), MOST_ROWS)
    return Limits(
        rows=(rows,),
        prompts=few_parts(
            rows, (FIRST_PROMPTS,) if is_read_at_once else Limits.prompts
        ),
        chunks=(chunk,),
        max_length=min(pages * PAGE_SIZE, cfg.max_positions),
        page_size=PAGE_SIZE,
        drafts=drafts,
        queue=num_prompts,
    )


def _power_of_two(size: int) -> int:
    """Returns the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
