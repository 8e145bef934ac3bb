"""Experts' arrays on their way to new homes: weights, moments, whatever has experts.

Who moves where is planned on the host (`jmoe.balance.homes`) and is data here: one
program makes any moves. A round carries at most one expert from each device to another,
which puts it where it has just taken its own from, and nothing is gathered. Arrays stay
where they are in memory; beside them is room for what a device has of one layer. On
GPUs an expert goes straight to its device, by a ragged all-to-all; CPUs lack it, and
send empty places to the others besides.

Shapes: L layer, M place of this device, E place of all devices, P device, R round, X
whatever else an array has.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.balance.homes import Moves
from jmoe.parallel import collectives, ragged


def move(x_LMX: jax.Array, moves: Moves, axes: collectives.Axes) -> jax.Array:
    """Returns this device's part after all moves; in place where `x_LMX` is donated.

    Args:
      moves: of these layers, between as many devices as `axes` has.
      axes: those that divide the experts, the outermost first.
    """

    def of_layer(layer: jax.Array, x_LMX: jax.Array) -> jax.Array:
        carry = functools.partial(_carry, moves=moves, axes=axes, layer=layer)
        sort = functools.partial(_sort, moves=moves, axes=axes, layer=layer)
        x_LMX = lax.fori_loop(0, moves.rounds_L[layer], carry, x_LMX)
        return lax.fori_loop(0, moves.sorts_L[layer], sort, x_LMX)

    return lax.fori_loop(0, len(x_LMX), of_layer, x_LMX)


def _carry(
    nth: jax.Array,
    x_LMX: jax.Array,
    moves: Moves,
    axes: collectives.Axes,
    layer: jax.Array,
) -> jax.Array:
    """Makes the moves of a round."""
    own, me = x_LMX.shape[1], collectives.axis_index(axes)
    from_P, to_P = moves.from_LRP[layer, nth], moves.to_LRP[layer, nth]
    leaves_P, comes_P = from_P // own == me, to_P // own == me
    nobody = collectives.axis_size(axes)

    def the_one(is_it_P: jax.Array, value_P: jax.Array) -> jax.Array:
        return jnp.where(is_it_P, value_P, 0).sum() + jnp.where(
            is_it_P.any(), 0, nobody
        )

    target, source = the_one(leaves_P, to_P // own), the_one(comes_P, from_P // own)
    at = layer, jnp.where(leaves_P, from_P % own, 0).sum()
    expert_X = x_LMX[at]
    came_X = _transport()(expert_X, target, source, axes)
    return x_LMX.at[at].set(jnp.where(leaves_P.any(), came_X, expert_X))


def _sort(
    _: jax.Array,
    x_LMX: jax.Array,
    moves: Moves,
    axes: collectives.Axes,
    layer: jax.Array,
) -> jax.Array:
    """Makes a layer's experts change places within devices."""
    own = x_LMX.shape[1]
    first = collectives.axis_index(axes) * own
    source_M = lax.dynamic_slice_in_dim(moves.source_LE[layer], first, own) - first
    return x_LMX.at[layer].set(x_LMX[layer, source_M])


def _padded(
    x_X: jax.Array, target: jax.Array, source: jax.Array, axes: collectives.Axes
) -> jax.Array:
    """Returns what `source` sends here while this device sends to `target`."""
    devices = collectives.axis_size(axes)
    sent_PX = (
        jnp.zeros((devices, *x_X.shape), x_X.dtype).at[target].set(x_X, mode="drop")
    )
    came_PX = collectives.all_to_all(sent_PX, axes, 0, 0)
    return came_PX.at[source].get(mode="fill", fill_value=0)


def _ragged(
    x_X: jax.Array, target: jax.Array, source: jax.Array, axes: collectives.Axes
) -> jax.Array:
    """Does as `_padded`, and sends nothing else."""
    peer_P = jnp.arange(collectives.axis_size(axes))
    zero_P = jnp.zeros_like(peer_P)
    sizes = ragged.Sizes(zero_P, peer_P == target, zero_P, peer_P == source)
    x_1X = x_X[None]
    return ragged.send(x_1X, ragged.zeros(1, x_1X), sizes, axes)[0]


def _transport():
    return _padded if collectives.platform() == "cpu" else _ragged
