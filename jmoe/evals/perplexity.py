"""A trained model's loss on held-out text, with its weights in any form."""

import math
import statistics
from typing import NamedTuple

import jax

from jmoe.data.loader import validation_batches
from jmoe.nn.model import Transformer
from jmoe.ops import fp8
from jmoe.train.losses import microbatch_losses
from jmoe.train.trained import Trained, quantized


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

    On one device, whatever the run's mesh. Products are by the run's `precision`.

    Args:
      form: of the weights, one of `jmoe.nn.quantized.FORMS`.

    Raises:
      ValueError: there is no such form.
    """
    run = trained.run
    batches = validation_batches(
        run.data,
        trained.tokenizer,
        batch_size=run.train.microbatch_size,
        num_batches=run.train.eval_batches,
    )
    variables = quantized(trained, form).variables
    model = Transformer(run.model, fp8.dot_general(run.precision))

    @jax.jit
    def loss(params, router_state, batch):
        return microbatch_losses(model, params, router_state, batch, run)[0].main

    mean_of_batch = [float(loss(**variables, batch=batch)) for batch in batches]
    return Perplexity(
        loss=statistics.fmean(mean_of_batch),
        tokens=sum(batch.tokens_BT[:, 1:].size for batch in batches),
        weight_bytes=sum(x.nbytes for x in jax.tree.leaves(variables["params"])),
    )
