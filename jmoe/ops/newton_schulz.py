"""The nearest matrix with orthogonal rows or columns, roughly, by products alone.

Shapes: N matrix, R rows, C columns, M the fewer of the two.

Jordan's quintic iteration (kellerjordan.github.io/posts/muon): of a matrix U S V^T it
makes U f(S) V^T, where f is five times s -> a s + b s^3 + c s^5. The coefficients are
those that grow small singular values fastest; larger ones end up within about 0.7 and
1.2 instead of at 1, which an optimizer's step doesn't mind.
"""

import jax
import jax.numpy as jnp

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-8


def newton_schulz(x_NRC: jax.Array) -> jax.Array:
    """Returns each matrix with its singular values near 1; a zero matrix stays zero.

    Products are in x's dtype, at the precision that its device multiplies it with by
    default: TF32 on a GPU is finer than the bfloat16 that the iteration is used with.
    """
    a, b, c = COEFFICIENTS
    is_tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if is_tall else x_NRC
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + EPSILON)

    def iterate(_: int, x: jax.Array) -> jax.Array:
        gram_NMM = x @ x.mT
        return a * x + (b * gram_NMM + c * gram_NMM @ gram_NMM) @ x

    x = jax.lax.fori_loop(0, STEPS, iterate, x)
    return x.mT if is_tall else x
