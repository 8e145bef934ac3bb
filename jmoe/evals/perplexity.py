"""A trained model's loss on held-out text, with its weights in any form."""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from jmoe.data.loader import validation_batches
from jmoe.nn.model import Transformer
from jmoe.nn.quantized import quantize_weights
from jmoe.ops import fp8
from jmoe.train.layout import make_layout, run_mesh
from jmoe.train.step import make_eval_step
from jmoe.train.trained import Trained


class Perplexity(NamedTuple):
    """Nats a token, over so many tokens; bytes of the weights, as they were used."""

    loss: float
    tokens: int
    weight_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def perplexity(trained: Trained, form: str = "native") -> Perplexity:
    """Of the first `train.eval_batches` of the run's validation text.

    Products are by the run's `precision`.

    Args:
      form: of the weights, one of `jmoe.nn.quantized.FORMS`.

    Raises:
      ValueError: the run is for a mesh, or `form` is none.
    """
    run = trained.run
    if run.mesh.num_devices > 1:
        raise ValueError(
            f"mesh={run.mesh.shape} has several devices: evaluate with mesh=data=1."
        )
    batches = validation_batches(
        run.data,
        trained.tokenizer,
        batch_size=run.train.microbatch_size,
        num_batches=run.train.eval_batches,
    )
    quantize = functools.partial(quantize_weights, cfg=run.model, form=form)
    params = jax.jit(quantize)(trained.variables["params"])
    model = Transformer(run.model, fp8.dot_general(run.precision))
    eval_step = jax.jit(
        make_eval_step(model, run, make_layout(model, run_mesh(run.mesh)))
    )
    parts = [eval_step(params, trained.variables["router_state"], b) for b in batches]
    total = jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(parts))
    return Perplexity(
        loss=float(total.loss / total.tokens),
        tokens=int(total.tokens),
        weight_bytes=sum(x.nbytes for x in jax.tree.leaves(params)),
    )
