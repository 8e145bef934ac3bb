"""The tokens of one step of decoding, of many sequences, as one row of T tokens.

Shapes: B sequence being decoded, Q token of one (the last drawn, and drafts), A
sequence being read, C token of its prompt, T token of the step, P one of these that a
token is drawn behind, R = B + A sequence, M page of a sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmoe.decode.sampling import Draws, Values
from jmoe.ops.paged import Sequences
from jmoe.parallel import collectives
from jmoe.parallel.vocabulary import AXIS


class DecodeRows(NamedTuple):
    """Sequences being decoded. Those at a position below 0 aren't there.

    token_BQ: the last token drawn, and drafts; position_B: that of the former. end_B:
    how many positions the sequence has room for. draws: see `jmoe.decode.sampling`.
    """

    slot_B: Values
    token_BQ: Values
    position_B: Values
    end_B: Values
    table_BM: Values
    draws: Draws


class PrefillChunks(NamedTuple):
    """Parts of prompts, of `count_A` tokens each, from position `start_A` on.

    next_A: the prompt's token behind the part; below 0, one is to be drawn. end_A: as
    rows have it.
    """

    slot_A: Values
    token_AC: Values
    start_A: Values
    count_A: Values
    next_A: Values
    end_A: Values
    table_AM: Values
    draws: Draws


class StepTokens(NamedTuple):
    """A step's tokens in a row: their ids, their positions, and whose they are.

    last_P: which of T a token is drawn of. slot_P, draws, drafts_PQ: for each, its
    slot, how it is drawn, and which tokens of the step lead to it, and -1.
    """

    token_T: jax.Array
    position_T: jax.Array
    groups: tuple[Sequences, ...]
    last_P: jax.Array
    slot_P: jax.Array
    draws: Draws
    drafts_PQ: jax.Array


class Heads(NamedTuple):
    """Each sequence's last token that stays: its index in T, and what rows know.

    One whose prompt goes on isn't there: its position is below 0.
    """

    index_R: jax.Array
    slot_R: jax.Array
    position_R: jax.Array
    end_R: jax.Array
    table_RM: jax.Array
    draws: Draws


def join(rows: DecodeRows, chunks: PrefillChunks) -> StepTokens:
    """Returns all tokens of a step, those of rows first."""
    width, size = rows.token_BQ.shape[1], chunks.token_AC.shape[1]
    position_B1 = rows.position_B[:, None]
    position_BQ = position_B1 + jnp.arange(width)
    is_there_BQ = (position_B1 >= 0) & (position_BQ < rows.end_B[:, None])
    position_BQ = jnp.where(is_there_BQ, position_BQ, -1)
    offset_C = jnp.arange(size)
    position_AC = jnp.where(
        offset_C < chunks.count_A[:, None], chunks.start_A[:, None] + offset_C, -1
    )
    groups = [
        Sequences(rows.table_BM, position_BQ),
        Sequences(chunks.table_AM, position_AC),
    ]
    last_A = _last_of(rows, chunks)
    # A row's token has seen the drafts before it, and itself.
    leads_BQQ = jnp.where(jnp.tri(width, dtype=bool), rows.token_BQ[:, None], -1)
    none_AQ = jnp.full((len(last_A), width), -1, jnp.int32)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), rows.draws)
    return StepTokens(
        _row(rows.token_BQ, chunks.token_AC, fill=0),
        _row(position_BQ, position_AC, fill=-1),
        tuple(group for group in groups if group.num_tokens),
        jnp.concatenate([jnp.arange(position_BQ.size), last_A]),
        jnp.concatenate([jnp.repeat(rows.slot_B, width), chunks.slot_A]),
        joined(repeated, chunks.draws),
        jnp.concatenate([leads_BQQ.reshape(-1, width), none_AQ]),
    )


def heads(rows: DecodeRows, chunks: PrefillChunks, new_B: jax.Array) -> Heads:
    """Returns where sequences go on, once so many of each row's tokens are right."""
    width = rows.token_BQ.shape[1]
    own_B = width * jnp.arange(len(new_B)) + new_B - 1
    position_B = jnp.where(rows.position_B >= 0, rows.position_B + new_B - 1, -1)
    # What follows of a prompt may be in this step, and cached: no draft goes there.
    is_end_A = (chunks.count_A > 0) & (chunks.next_A < 0)
    position_A = jnp.where(is_end_A, chunks.start_A + chunks.count_A - 1, -1)
    return Heads(
        index_R=jnp.concatenate([own_B, _last_of(rows, chunks)]),
        slot_R=jnp.concatenate([rows.slot_B, chunks.slot_A]),
        position_R=jnp.concatenate([position_B, position_A]),
        end_R=jnp.concatenate([rows.end_B, chunks.end_A]),
        table_RM=jnp.concatenate([rows.table_BM, chunks.table_AM]),
        draws=joined(rows.draws, chunks.draws),
    )


def follow(chunks: PrefillChunks, drawn_BQ: jax.Array, drawn_A: jax.Array) -> jax.Array:
    """Returns the token that follows each of T, as far as it is known."""
    offset_C = jnp.arange(chunks.token_AC.shape[1])
    is_last_AC = offset_C == chunks.count_A[:, None] - 1
    next_A = jnp.where(chunks.next_A >= 0, chunks.next_A, drawn_A)
    next_AC = jnp.roll(chunks.token_AC, -1, axis=1)
    next_AC = jnp.where(is_last_AC, next_A[:, None], next_AC)
    return _row(drawn_BQ, next_AC, fill=0)


def joined(*trees: Draws) -> Draws:
    """Returns the rows of the first, then those of the next."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


def pad(x_T: jax.Array, fill: int) -> jax.Array:
    """Returns tokens that divide over the tensor group."""
    missing = -len(x_T) % collectives.axis_size(AXIS)
    return jnp.pad(x_T, (0, missing), constant_values=fill)


def _row(x_BQ: jax.Array, x_AC: jax.Array, fill: int) -> jax.Array:
    return pad(jnp.concatenate([x_BQ.reshape(-1), x_AC.reshape(-1)]), fill)


def _last_of(rows: DecodeRows, chunks: PrefillChunks) -> jax.Array:
    """Returns where each chunk's last token is in T."""
    first_A = rows.token_BQ.size + chunks.token_AC.shape[1] * jnp.arange(
        len(chunks.count_A)
    )
    return first_A + jnp.maximum(chunks.count_A - 1, 0)
