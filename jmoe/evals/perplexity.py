"""A trained model's loss on held-out text, with its weights in any form."""

import math
from typing import NamedTuple

import jax
import numpy as np

from jmoe.data.loader import validation_batches
from jmoe.nn.model import Transformer
from jmoe.ops import fp8
from jmoe.train import compiled
from jmoe.train.losses import microbatch_losses, normalisers
from jmoe.train.microbatch import Microbatch
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
    """Returns the perplexity of a run's first `train.eval_batches` of validation text.

    On one device, whatever the run's mesh. Products are by the run's `precision`.

    Args:
      form: of the weights, one of `jmoe.nn.quantized.FORMS`.

    Raises:
      ValueError: there is no such form.
    """
    compiled.make_room()
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
    def sums(params, router_state, batch):
        """Returns a batch's nats and targets."""
        norms = normalisers(batch, run)
        part = Microbatch(batch)
        losses, _ = microbatch_losses(model, params, router_state, part, run, norms)
        return losses.main * norms.targets[0], norms.targets[0]

    found = [jax.device_get(sums(**variables, batch=batch)) for batch in batches]
    nats, targets = np.asarray(found, np.float64).sum(0)
    return Perplexity(
        loss=float(nats / targets),
        tokens=int(targets),
        weight_bytes=sum(x.nbytes for x in jax.tree.leaves(variables["params"])),
    )
