"""MTP modules that draft for vLLM; it needs vLLM and Ray (`pytest -m serving`)."""

from typing import Any

import jax.numpy as jnp
import pytest

from jmoe.decode.generate import generate
from jmoe.nn.block import Positions
from jmoe.nn.mixers import rotation
from jmoe.nn.model import Transformer
from jmoe.nn.mtp import MTPModule
from jmoe.ops.masks import shift_left
from tests.serve.client import PROMPTS

pytestmark = pytest.mark.serving
NEW = 60
DRAFTED, ACCEPTED = (
    f"vllm:spec_decode_num_{what}_total" for what in ("drafts", "accepted_tokens")
)


@pytest.fixture(scope="module")
def server(start):
    with start("--mtp") as server:
        yield server


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_drafts_change_no_token_and_are_accepted_as_our_own_head_says(
    server, trained, prompt
):
    (longer,) = generate(
        trained.run.model, trained.variables, [prompt], max_new_tokens=NEW + 1
    )
    before = [total(server, name) for name in (DRAFTED, ACCEPTED)]
    assert server.complete(prompt, NEW) == longer[:NEW]
    drafted, accepted = simulated(trained, prompt, longer)
    assert 0 < accepted < drafted  # else the counts say little
    server.wait_for(lambda: total(server, DRAFTED) - before[0] >= drafted)
    after = [total(server, name) for name in (DRAFTED, ACCEPTED)]
    assert [after[0] - before[0], after[1] - before[1]] == [drafted, accepted]


def total(server, name: str) -> float:
    return sum(server.measured(name).values())


def simulated(trained, prompt: list[int], new: list[int]) -> tuple[int, int]:
    """How many of NEW tokens are drafted and accepted: a draft a step, then a check."""
    draft_T = drafts(trained, [*prompt, *new])
    drafted = accepted = 0
    known = 1  # the prompt's own step drafts, but has nothing to check
    while known < NEW:
        right = int(draft_T[len(prompt) + known - 2]) == new[known]
        drafted += 1
        accepted += right
        known += 1 + right
    return drafted, accepted


def drafts(trained, tokens: list[int]) -> Any:
    """For each position, the MTP module's guess of the token after the next.

    As in vLLM, the first position's embedding is zero.
    """
    cfg, params = trained.run.model, trained.variables["params"]
    tokens_BT = jnp.asarray([tokens])
    features: Any = Transformer(cfg).apply(
        trained.variables, tokens_BT, method="features"
    )
    embedded_BTD = params["embedding"][shift_left(tokens_BT, 1)].at[:, 0].set(0)
    positions = Positions(rotation(cfg.attention, len(tokens)))
    module = {name: tree["mtp_0"] for name, tree in trained.variables.items()}
    outputs: Any = MTPModule(cfg).apply(
        module, features.hidden_BSD, embedded_BTD, positions, jnp.int32(cfg.num_layers)
    )
    return jnp.argmax(outputs[1][0] @ features.head_DV, axis=-1)
