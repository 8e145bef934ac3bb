"""Numbers of several dtypes as the bits of one array, so that they travel at once.

Shapes: N number, P device of those whose numbers are gathered.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def packed(found: Any) -> jax.Array:
    """Returns all numbers as int32 [N], so that they travel at once."""
    leaves = jax.tree.leaves(found)
    bits = [lax.bitcast_convert_type(jnp.asarray(x), jnp.int32) for x in leaves]
    return jnp.concatenate([x.reshape(-1) for x in bits])


def unpacked(packed_PN: jax.Array, shapes: Any) -> Any:
    """Returns the inverse of `packed` for each part, joined along the first one."""
    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    found = []
    for leaf, bits_PN in zip(leaves, jnp.split(packed_PN, ends, axis=1), strict=True):
        x = lax.bitcast_convert_type(bits_PN, leaf.dtype)
        shape = len(packed_PN) * leaf.shape[0], *leaf.shape[1:]
        found.append(x.reshape(shape))
    return jax.tree.unflatten(tree, found)
