"""What the table of mixers says of each kind, against the kind itself."""

import typing

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from jmoe.config import AttentionConfig, GQAConfig, MLAConfig
from jmoe.nn.mixers import MIXERS, rotation

MLA = MLAConfig(
    num_heads=4,
    query_latent_dim=None,
    kv_latent_dim=24,
    nope_dim=6,
    rope_dim=8,
    value_dim=10,
)
GQA = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=12, rope_dim=8)


def test_every_record_of_attention_has_a_row():
    kinds = [record.kind for record in typing.get_args(AttentionConfig)]
    assert kinds == list(MIXERS) == [MLA.kind, GQA.kind]


@pytest.mark.parametrize("cfg", [MLA, GQA], ids=MIXERS)
def test_a_decoder_keeps_what_new_keys_and_values_are_made_of(cfg):
    """As many numbers as the module has columns for, in the activations' dtype."""
    module = MIXERS[cfg.kind].module(cfg, 0.02)
    x_BTD = jnp.zeros((1, 5, 32))
    variables = jax.eval_shape(
        module.init, jax.random.key(0), x_BTD, rotation(cfg, 5), None
    )
    params = meta.unbox(variables["params"])
    sources = {"mla": ["kv_down"], "gqa": ["key", "value"]}[cfg.kind]
    columns = sum(params[name]["kernel"].size // 32 for name in sources)
    kept = MIXERS[cfg.kind].cached(cfg, jnp.bfloat16)
    assert sum(x.size for x in kept.values()) == columns
    assert {x.dtype for x in kept.values()} == {jnp.dtype(jnp.bfloat16)}


def test_heads_of_their_own_cost_what_grouped_ones_do_and_their_projections():
    mixer, own = MIXERS["gqa"], GQAConfig(**vars(GQA) | {"num_kv_heads": 4})
    hidden, length = 32, 100
    more = mixer.cost(own, hidden, length) - mixer.cost(GQA, hidden, length)
    assert more == 2 * 2 * 2 * hidden * GQA.head_dim
