"""More computations than XLA's client of several CPU devices has room for."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from jmoe.config import override
from jmoe.train import loop, stretch
from jmoe.train.ahead import Ahead
from jmoe.train.step import Evaluation

# Evaluates more batches than 32, each for some milliseconds, on four devices that meet.
EVALUATE = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jmoe.train.stretch import evaluate
from jmoe.train.state import TrainState
from jmoe.train.step import Evaluation

def meet(params, router_state, batch):
    powers = jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ params), params)
    loss = jax.lax.psum(batch + 0 * powers.sum(), "data")
    return Evaluation(loss=loss, tokens=jnp.int32(4), load_LE=jnp.ones((1, 2)))

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
whole = NamedSharding(mesh, PartitionSpec())
meet = jax.shard_map(meet, mesh=mesh, in_specs=whole.spec, out_specs=whole.spec)
params, *batches = jax.device_put([jnp.eye(192), *map(jnp.float32, range(65))], whole)
state = TrainState(step=None, params=params, router_state=None, opt_state=None)
print(evaluate(jax.jit(meet), state, batches)["val_loss"])
"""


def test_an_evaluation_on_several_devices_ends():
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE],
        env=os.environ | devices,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 32  # the mean of the batches' numbers


def test_all_but_a_few_results_are_there():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 40, lambda _, y: jnp.tanh(y @ x), x)

    ahead, results = Ahead(most=2), []
    for _ in range(6):
        results.append({"power": slow(jnp.eye(192))})
        ahead.add(results[-1])
    assert all(result["power"].is_ready() for result in results[:4])


def test_a_training_counts_its_steps_and_evaluations(
    sharing_programs, smallest, tmp_path, monkeypatch
):
    added = []

    class Counted(Ahead):
        def add(self, result):
            added.append(type(result))
            super().add(result)

    monkeypatch.setattr(stretch, "Ahead", Counted)
    run = override(smallest, ["train.steps=3", "schedule.steps=40"])
    assert loop.train(run, tmp_path / "run") == 0
    assert added == [dict] * 3 + [Evaluation] * run.train.eval_batches
