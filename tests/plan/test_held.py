"""What a run holds on a device: by the plan, and by the arrays themselves."""

import jax
import numpy as np

from jmoe.config import override
from jmoe.nn.model import Transformer
from jmoe.parallel.mesh import make_mesh
from jmoe.plan.held import held
from jmoe.train import layout as layouts
from jmoe.train.optimizer import make_optimizer
from jmoe.train.state import make_state
from tests.plain_run import plain_run

RUN = override(
    plain_run(),
    [
        "mesh={'data': 2, 'expert': 2, 'tensor': 2}",
        "train.batch_size=16",
        "train.microbatch_size=4",
        "optimizer.moment_dtype=bfloat16",
    ],
)


def test_a_device_holds_what_the_plan_says():
    model = Transformer(RUN.model)
    layout = layouts.make_layout(model, make_mesh(RUN.mesh, jax.devices()[:8]))
    optimizer = make_optimizer(RUN.optimizer, RUN.horizon, layout)
    shapes = jax.eval_shape(lambda: make_state(model, optimizer, 0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = jax.device_put(zeros, layouts.shardings(layout, shapes))
    device = jax.devices()[0]

    def size(tree):
        parts = (p for x in jax.tree.leaves(tree) for p in x.addressable_shards)
        return sum(part.data.nbytes for part in parts if part.device == device)

    found = held(RUN)
    assert found.weights == found.gradients == size(state.params)
    assert found.moments == size(state.opt_state)
    assert found.total < 3 * sum(x.nbytes for x in jax.tree.leaves(state.params)) / 4
