"""Weights of lent experts: on their way to who computes them, and their gradients home.

Who borrows what is known everywhere (`jmoe.balance.lending`), and differs with every
microbatch. On GPUs an expert goes straight to its borrower, by a ragged all-to-all for
each slot. CPUs lack it: there each device sends two experts that it lends to all, and
so on as long as there is one that lends more. Where nothing is lent, nothing is sent.
Gradients come back, on CPUs in an all-to-all for each of these rounds, and are added at
home, in the order of devices and slots.

Shapes: M own expert of this device, P device of the `expert` axis, S slot, X whatever
there are many of, Q loan of a round on GPUs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import fp8
from jmoe.parallel import collectives, ragged
from jmoe.parallel.travel import AXIS

A_ROUND = 2  # experts of each device that CPUs send at a time


class Form(NamedTuple):
    """How weights travel: pack(w) -> a tree of arrays; unpack(tree, dtype) -> w.

    The tree's arrays have w's first dimension, that of experts.
    """

    pack: Callable[[jax.Array], Any]
    unpack: Callable[[Any, Any], jax.Array]


def in_dtype(dtype: Any) -> Form:
    """Returns weights converted as products in `dtype` will convert them anyway."""
    return Form(lambda w: w.astype(dtype), lambda w, of: w.astype(of))


def in_fp8(recipe: fp8.Recipe, dtype: Any) -> Form:
    """Returns weights quantized as products of `dtype` will have them.

    These quantize a second time, which leaves the numbers that e4m3 stands for as they
    are: to the bit in bfloat16, but for scales' last bit in float32.
    """

    def pack(w):
        matrices = w.astype(dtype).reshape(*w.shape[:2], -1)
        return recipe.quantize(matrices, recipe.weights)

    return Form(pack, fp8.dequantize)


def bytes_of_expert(weights: Any, form: Form) -> int:
    """Returns the size of one expert as it travels, of arrays with experts in front."""
    sizes = [len(w) for w in weights]
    packed = jax.eval_shape(lambda: [form.pack(w) for w in weights])
    return sum(
        x.size * x.dtype.itemsize // size
        for tree, size in zip(packed, sizes, strict=True)
        for x in jax.tree.leaves(tree)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lend(
    own: jax.Array, borrowed_PS: jax.Array, form: Form
) -> tuple[jax.Array, jax.Array]:
    """Returns this device's experts as they are, and those that it borrows, [S, ...].

    An empty slot has zeros. The gradient of what is lent is added to that of `own`.

    Args:
      borrowed_PS: int32, the experts that each device borrows; E or more for none.
    """
    packed = form.pack(own)
    carried = jax.tree.map(lambda x: _transport().lend(x, borrowed_PS), packed)
    lent = form.unpack(carried, own.dtype)
    return own, lent.reshape(-1, *own.shape[1:])


def _lend_forward(own, borrowed_PS, form):
    return lend(own, borrowed_PS, form), borrowed_PS


def _lend_backward(form, borrowed_PS, d_parts):
    del form  # gradients travel as they are
    return _transport().give_back(*d_parts, borrowed_PS), None


lend.defvjp(_lend_forward, _lend_backward)


def _home_PS(borrowed_PS: jax.Array, own: int) -> jax.Array:
    """Returns the device at which each borrowed expert is at home; P for none."""
    return jnp.minimum(borrowed_PS // own, len(borrowed_PS))


def _local_PS(borrowed_PS: jax.Array, own: int) -> jax.Array:
    """Returns where each borrowed expert is here; `own` if it isn't this device's."""
    me = collectives.axis_index(AXIS)
    is_mine_PS = _home_PS(borrowed_PS, own) == me
    return jnp.where(is_mine_PS, borrowed_PS - me * own, own)


class _Rounds(NamedTuple):
    """Lent experts in rounds, in each of which a home sends a few of its own.

    rank_PS: int32, a borrowed expert's place among those that its home lends; -1 for
    none. local_M: int32, the experts that are lent here, in this order; then any.
    size: of a round. count: of rounds.
    """

    rank_PS: jax.Array
    local_M: jax.Array
    size: int
    count: jax.Array

    def places(self, home_PS: jax.Array, nth: jax.Array) -> jax.Array:
        """Returns where loans travel in this round, [P, S], of all homes' places.

        Beyond them if they don't.
        """
        place_PS = self.rank_PS - nth * self.size
        is_now_PS = (self.rank_PS >= 0) & (place_PS >= 0) & (place_PS < self.size)
        beyond = len(home_PS) * self.size
        return jnp.where(is_now_PS, home_PS * self.size + place_PS, beyond)

    def mine(self, nth: jax.Array) -> jax.Array:
        """Returns which experts leave from here in this round."""
        return self.local_M[nth * self.size + jnp.arange(self.size)]


def _rounds(borrowed_PS: jax.Array, own: int) -> _Rounds:
    peers, me = len(borrowed_PS), collectives.axis_index(AXIS)
    expert_PM = jnp.arange(peers * own, dtype=jnp.int32).reshape(peers, own)
    is_lent_PM = (expert_PM[..., None] == borrowed_PS.reshape(-1)).any(-1)
    rank_PM = jnp.cumsum(is_lent_PM, axis=1, dtype=jnp.int32) - 1
    rank_X = jnp.where(is_lent_PM, rank_PM, -1).reshape(-1)
    rank_PS = rank_X.at[borrowed_PS].get(mode="fill", fill_value=-1)
    size = min(A_ROUND, own)
    (local_M,) = jnp.nonzero(is_lent_PM[me], size=own + size, fill_value=0)
    return _Rounds(rank_PS, local_M, size, -(-(rank_PS.max() + 1) // size))


def _lend_padded(own: jax.Array, borrowed_PS: jax.Array) -> jax.Array:
    me, rounds = collectives.axis_index(AXIS), _rounds(borrowed_PS, len(own))
    home_PS = _home_PS(borrowed_PS, len(own))

    def bring(nth, lent):
        came = collectives.all_gather(own[rounds.mine(nth)], AXIS, 0)
        place_S = rounds.places(home_PS, nth)[me]
        at_S = jnp.where(place_S < len(came), jnp.arange(len(lent)), len(lent))
        return lent.at[at_S].set(came[place_S], mode="drop")

    lent = jnp.zeros((borrowed_PS.shape[1], *own.shape[1:]), own.dtype)
    return lax.fori_loop(0, rounds.count, bring, lent)


def _give_back_padded(
    d_own: jax.Array, d_lent: jax.Array, borrowed_PS: jax.Array
) -> jax.Array:
    me, rounds = collectives.axis_index(AXIS), _rounds(borrowed_PS, len(d_own))
    home_PS = _home_PS(borrowed_PS, len(d_own))
    places = len(home_PS) * rounds.size

    def add_round(nth, d_own):
        place_PS, local_M = rounds.places(home_PS, nth), rounds.mine(nth)
        sent = jnp.zeros((places, *d_lent.shape[1:]), d_lent.dtype)
        sent = sent.at[place_PS[me]].set(d_lent, mode="drop")
        came = collectives.all_to_all(sent, AXIS, 0, 0)
        place_M = me * rounds.size + jnp.arange(rounds.size)
        is_here_PM = (place_PS[:, :, None] == place_M).any(1)
        (loan_X,) = jnp.nonzero(is_here_PM.reshape(-1), size=places)

        def add(i, d_own):
            loan = loan_X[i]
            return d_own.at[local_M[loan % rounds.size]].add(came[loan])

        return lax.fori_loop(0, is_here_PM.sum(), add, d_own)

    return lax.fori_loop(0, rounds.count, add_round, d_own)


def _add(d_own: jax.Array, local_X: jax.Array, d_lent_X: jax.Array) -> jax.Array:
    """Adds each loan's gradient to its expert's, in their order."""

    def add(i, d_own):
        return d_own.at[local_X[i]].add(d_lent_X[i], mode="drop")

    return lax.fori_loop(0, len(local_X), add, d_own)


def _lend_ragged(own: jax.Array, borrowed_PS: jax.Array) -> jax.Array:
    me = collectives.axis_index(AXIS)
    home_PS = _home_PS(borrowed_PS, len(own))
    local_PS = _local_PS(borrowed_PS, len(own))
    peer_P, zero_P = jnp.arange(len(borrowed_PS)), jnp.zeros(len(borrowed_PS), int)
    came = ragged.late_zeros(borrowed_PS.shape[1], own)
    for slot, local_P in enumerate(local_PS.T):
        is_mine_P = local_P < len(own)
        sizes = ragged.Sizes(
            jnp.where(is_mine_P, local_P, 0),
            is_mine_P,
            slot + zero_P,
            peer_P == home_PS[me, slot],
        )
        came = ragged.send(own, came, sizes, AXIS)
    return came


class _Incoming(NamedTuple):
    """Loans in the order in which their gradients come home.

    rank_PS: int32, a loan's place among those of its home. most: how many the busiest
    home has.
    """

    rank_PS: jax.Array
    most: jax.Array


def _incoming(home_PS: jax.Array) -> _Incoming:
    home_X = home_PS.reshape(-1)
    is_before_XX = jnp.tri(home_X.size, k=-1, dtype=bool)
    same_XX = home_X[:, None] == home_X[None, :]
    rank_X = (same_XX & is_before_XX).sum(1, dtype=jnp.int32)
    most = jnp.where(home_X < len(home_PS), rank_X + 1, 0).max()
    return _Incoming(rank_X.reshape(home_PS.shape), most)


def _give_back_ragged(
    d_own: jax.Array, d_lent: jax.Array, borrowed_PS: jax.Array
) -> jax.Array:
    """Adds as many gradients a round as there are slots, which is mostly all.

    The first round is always, so that what follows needn't wait for it to know.
    """
    me, (peers, slots) = collectives.axis_index(AXIS), borrowed_PS.shape
    home_PS = _home_PS(borrowed_PS, len(d_own))
    local_PS, incoming = _local_PS(borrowed_PS, len(d_own)), _incoming(home_PS)
    peer_P, zero_P = jnp.arange(peers), jnp.zeros(peers, int)

    def add_round(nth, d_own):
        place_PS = incoming.rank_PS - nth * slots
        is_now_PS = (place_PS >= 0) & (place_PS < slots)
        came = ragged.late_zeros(slots, d_lent)
        for slot in range(slots):
            sizes = ragged.Sizes(
                zero_P,
                (peer_P == home_PS[me, slot]) & is_now_PS[me, slot],
                jnp.where(is_now_PS[me, slot], place_PS[me, slot], 0) + zero_P,
                (home_PS[:, slot] == me) & is_now_PS[:, slot],
            )
            came = ragged.send(d_lent[slot : slot + 1], came, sizes, AXIS)
        at_PS = jnp.where(is_now_PS & (local_PS < len(d_own)), place_PS, slots)
        local_Q = jnp.full(slots, len(d_own), jnp.int32)
        local_Q = local_Q.at[at_PS].set(local_PS, mode="drop")
        return _add(d_own, local_Q, came)

    rounds = -(-incoming.most // slots)
    return lax.fori_loop(1, rounds, add_round, add_round(0, d_own))


class _Transport(NamedTuple):
    """lend(own, borrowed_PS) -> lent.

    give_back(d_own, d_lent, borrowed_PS) -> d_own.
    """

    lend: Callable[..., jax.Array]
    give_back: Callable[..., jax.Array]


_PADDED = _Transport(_lend_padded, _give_back_padded)
_RAGGED = _Transport(_lend_ragged, _give_back_ragged)


def _transport() -> _Transport:
    return _PADDED if collectives.platform() == "cpu" else _RAGGED
