"""One step of decoding, as a pure function: some tokens of many sequences at once.

A step computes, for each sequence that is being decoded, the token that was drawn last
and the drafts of those to follow it, and for others the next part of their prompts. All
of them go through the layers as one sequence (`jmoe.decode.batch`). Of each position
that a sequence may go on from, a token is drawn; of the drafts, those before the first
that isn't what was drawn are right. What the cache has of the others is written over by
the next step.

Shapes: X slot, B sequence being decoded, Q token of one (the last drawn, and drafts), A
sequence being read, R = B + A, P token of the step that one is drawn behind, K draft, S
this device's tokens, D hidden, V vocabulary (this device's part), N likely token, L MoE
layer, E expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.config import ModelConfig
from jmoe.decode import batch as batches
from jmoe.decode import layers, seen
from jmoe.decode.batch import DecodeRows, PrefillChunks
from jmoe.decode.drafts import draft
from jmoe.decode.sampling import Sampled, sample
from jmoe.decode.weights import Weights, layers_of


class State(NamedTuple):
    """What a decoder remembers on its device.

    layers: each block's collection `cache`; mtp: the first MTP module's, or None.
    seen_XV: bool, which tokens occurred in the sequence of each slot.
    """

    layers: tuple[Any, ...]
    mtp: Any
    seen_XV: jax.Array


class StepResult(NamedTuple):
    """What was drawn of rows [B, Q] and chunks [A], and how many of a row's are new.

    draft_BK, draft_AK: what the next step should try. count_LE: int32, how many of the
    step's real tokens chose each expert of the model's MoE layers; dropped_L: how many
    of these choices nobody computed. Those of the MTP module, by which drafts are made,
    are not counted.
    """

    rows: Sampled
    new_B: jax.Array
    draft_BK: jax.Array
    chunks: Sampled
    draft_AK: jax.Array
    count_LE: jax.Array
    dropped_L: jax.Array


def step(
    cfg: ModelConfig,
    num_top: int,
    weights: Weights,
    state: State,
    rows: DecodeRows,
    chunks: PrefillChunks,
) -> tuple[State, StepResult]:
    """Returns the state after these tokens, and what follows them.

    Rows with drafts get new ones, and chunks too.

    Args:
      num_top: N.
    """
    batch = batches.join(rows, chunks)
    known = layers.known(cfg, batch.token_T, batch.position_T, batch.groups)
    x_SD = layers.embedded(cfg, weights, batch.token_T)
    blocks = layers_of(cfg, weights)
    x_SD, caches, counts = layers.blocks(cfg, blocks, state.layers, x_SD, known)
    tail = state._replace(layers=())
    told = x_SD, counts, rows, chunks
    tail, result = finish(cfg, num_top, weights, tail, *told)
    return tail._replace(layers=caches), result


def finish(
    cfg: ModelConfig,
    num_top: int,
    weights: Weights,
    state: State,
    x_SD: jax.Array,
    counts: layers.Counts,
    rows: DecodeRows,
    chunks: PrefillChunks,
) -> tuple[State, StepResult]:
    """Returns what comes of the last block's output: tokens, drafts, what was seen.

    Args:
      state: whose layers aren't looked at.
      counts: of the layers, which become part of the result.
    """
    batch = batches.join(rows, chunks)
    hidden_SD = layers.final_norm(cfg, weights, x_SD)
    seen_XV = seen.read(state.seen_XV, chunks)
    sampled = _draw(weights, hidden_SD, batch, seen_XV, num_top)

    of_rows, of_chunks = _parted(sampled, rows.token_BQ.shape)
    is_right_BQ = of_rows.token[:, :-1] == rows.token_BQ[:, 1:]
    new_B = 1 + jnp.cumprod(is_right_BQ.astype(jnp.int32), axis=1).sum(1)
    is_new_BQ = jnp.arange(rows.token_BQ.shape[1]) < new_B[:, None]
    seen_XV = seen.note(seen_XV, rows.slot_B, of_rows.token, is_new_BQ)
    drawn_A1, is_end_A1 = of_chunks.token[:, None], (chunks.next_A < 0)[:, None]
    seen_XV = seen.note(seen_XV, chunks.slot_A, drawn_A1, is_end_A1)
    state = state._replace(seen_XV=seen_XV)

    draft_RK = jnp.zeros((len(rows.slot_B) + len(chunks.slot_A), 0), jnp.int32)
    num_drafts = rows.token_BQ.shape[1] - 1
    if num_drafts:
        follow_T = batches.follow(chunks, of_rows.token, of_chunks.token)
        heads = batches.heads(rows, chunks, new_B)
        told = seen_XV, hidden_SD, follow_T, batch, heads
        cache, draft_RK = draft(cfg, weights, state.mtp, *told, num_drafts)
        state = state._replace(mtp=cache)
    draft_BK, draft_AK = jnp.split(draft_RK, [len(rows.slot_B)])
    drawn = of_rows, new_B, draft_BK, of_chunks, draft_AK
    return state, StepResult(*drawn, *counts)


def _draw(weights, hidden_SD, batch, seen_XV, num_top) -> Sampled:
    """Returns a token for each row that one is to be drawn of."""
    last_PD = layers.whole(hidden_SD)[batch.last_P]

    def seen_here():
        seen_PV = seen_XV.at[batch.slot_P].get(mode="clip")
        row_P = jnp.arange(len(batch.slot_P))
        return seen.note(seen_PV, row_P, batch.drafts_PQ, batch.drafts_PQ >= 0)

    position_P = batch.position_T[batch.last_P] + 1
    logits_PV = layers.logits(weights, last_PD)
    return sample(logits_PV, batch.draws, position_P, seen_here, num_top)


def _parted(sampled: Sampled, shape: tuple[int, ...]) -> tuple[Sampled, Sampled]:
    """Returns the rows' part of what was drawn, [B, Q, ...], and the chunks'."""
    of_rows = shape[0] * shape[1]
    rows = [x[:of_rows].reshape(*shape, *x.shape[1:]) for x in sampled]
    return Sampled(*rows), Sampled(*(x[of_rows:] for x in sampled))
