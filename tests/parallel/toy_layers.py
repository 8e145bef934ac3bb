"""Small layers, each with something that a layer may have, to be cut into passes."""

import jax
import jax.numpy as jnp
import numpy as np

# No two sizes are the same, so that shapes tell what a value is.
N, D, F = 6, 5, 7

LAYERS = {}


def toy(function):
    """Enters a layer of weights a (D, F), b (F, D), s (D,), and row of each token."""
    LAYERS[function.__name__] = function
    return function


@toy
def plain(w, row, x):
    h = jnp.tanh(x @ w["a"])
    return (h @ w["b"] + x, (h**2).sum()), {"largest": h.max()}


@toy
def nested_jit(w, row, x):
    @jax.jit
    def outer(a, x):
        return jax.jit(lambda a, x: jnp.sin(x @ a))(a, x) + 1

    return outer(w["b"].T, outer(w["a"], x) @ w["b"]) @ w["b"], None


@jax.custom_vjp
def double(x, scale):
    return 2 * x * scale


double.defvjp(
    lambda x, scale: (double(x, scale), (x, scale)),
    lambda kept, d: (3 * d * kept[1], (d * kept[0]).sum(0)),  # as no rule of JAX's is
)


@toy
def custom_vjp(w, row, x):
    return double(x @ w["a"] @ w["b"], w["s"]), None


@toy
def recomputed_part(w, row, x):
    part = jax.checkpoint(lambda a, x: jnp.tanh(jnp.tanh(x @ a) @ a.T))
    return part(w["a"], x) @ w["a"] @ w["b"], None


@toy
def scan_inside(w, row, x):
    def step(x, scale):
        return jnp.tanh(scale * x @ w["a"]) @ w["b"], x.sum()

    return jax.lax.scan(step, x, w["s"])


@toy
def integers_at_hand(w, row, x):
    h = (x @ w["a"])[row] * (row % 2)[:, None]
    return h @ w["b"], {"counts": jnp.bincount(row, length=N)}


@toy
def several_outputs(w, row, x):
    h = x @ w["a"]
    return {"one": h @ w["b"], "two": (jnp.cos(h), x * w["s"])}, None


@toy
def unused_weight(w, row, x):
    return jnp.sin(x) * w["s"], None


@toy
def the_input_itself(w, row, x):
    return (x, x @ w["a"]), None


@toy
def the_weight_itself(w, row, x):
    return (w["a"], x * w["s"]), None


@toy
def an_output_of_no_input(w, row, x):
    return (x @ w["a"], jnp.tanh(w["b"]).sum(), jnp.float32(0)), {"row": row}


@toy
def no_input_matters(w, row, x):
    return jnp.tanh(w["a"] @ w["b"])[: D - 1], None


@toy
def weights_multiplied(w, row, x):
    return jnp.sin(x @ (w["a"] @ w["b"])), None


@jax.custom_vjp
def own_gradient(x, scale):
    return x * scale


own_gradient.defvjp(
    lambda x, scale: (own_gradient(x, scale), (x, scale)), lambda kept, _: kept
)


@toy
def gradients_that_need_no_output(w, row, x):
    """Adds, in the backward pass, those that an auxiliary loss would have."""
    return own_gradient(x, w["s"]), None


@toy
def narrow_weights(w, row, x):
    a, b = (w[name].astype(jnp.bfloat16) for name in "ab")
    h = jnp.tanh(x.astype(a.dtype) @ a)
    return (h @ b.reshape(D, F).T).astype(jnp.float32), None


@toy
def a_sum_with_a_weight(w, row, x):
    return x + jnp.zeros((N, 1)) + w["s"], None


RECOMPUTED = {
    f"{name}_recomputed": jax.checkpoint(LAYERS[name])
    for name in ("plain", "nested_jit", "scan_inside", "the_input_itself")
}
ALL = LAYERS | RECOMPUTED


def arguments():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights = {"a": draw(D, F), "b": draw(F, D), "s": draw(D)}
    return weights, jnp.asarray([3, 0, 0, 5, 2, 1]), draw(N, D)
