"""From logits to the next token. Shapes: B sequence, V vocabulary."""

import jax
import jax.numpy as jnp


def sample(
    logits_BV: jax.Array, key: jax.Array, temperature: float, top_p: float
) -> jax.Array:
    """Returns one token a row, int32 [B].

    Args:
      temperature: divides the logits; 0 takes the most likely token.
      top_p: draws from the smallest set of tokens whose probability reaches this
        (nucleus sampling, arXiv 1904.09751); 1 draws from all.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        share_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays if those before it don't reach top_p; so the first always does.
        kept_BV = jnp.cumsum(share_BV, axis=-1) - share_BV < top_p
        least_B = jnp.where(kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)
