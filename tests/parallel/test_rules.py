"""From dimensions to axes: what the table allows, and whom an error names."""

import functools

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jmoe.config import ModelConfig, override
from jmoe.nn.model import Transformer, init_variables
from jmoe.parallel import rules

SHAPE = {"data": 2, "pipe": 1, "expert": 4, "tensor": 2}


def boxed(*settings):
    cfg = override(ModelConfig.preset("tiny"), settings)
    init = functools.partial(init_variables, Transformer(cfg), 0)
    return jax.eval_shape(init)["params"]


def test_a_model_is_divided_by_vocabulary_heads_experts_and_mlps():
    specs = rules.specs(boxed(), SHAPE)
    moe = specs["moe"]
    assert specs["embedding"] == P("tensor", None)
    assert specs["head"] == P(None, "tensor")
    assert moe["attention"]["kv_up"]["kernel"] == P(None, None, "tensor", None)
    assert moe["attention"]["kv_down"]["kernel"] == P(None, None, None)
    assert moe["attention"]["out"]["kernel"] == P(None, "tensor", None)
    assert moe["moe"]["experts"]["down"] == P(None, "expert", "tensor", None)
    assert moe["moe"]["shared"]["down"]["kernel"] == P(None, "tensor", None)
    assert moe["moe"]["router"]["kernel"] == P(None, None, None)


def test_every_parameter_gets_a_spec_of_its_own_rank():
    params = boxed()
    specs, shapes = rules.specs(params, SHAPE), jax.tree.leaves(params)
    for spec, x in zip(jax.tree.leaves(specs), shapes, strict=True):
        assert len(spec) == len(x.shape)


@pytest.mark.parametrize(
    ("axis", "size", "named"),
    [
        ("expert", 3, "down: dimension 'expert' of size 32 must divide over expert=3"),
        (
            "tensor",
            3,
            "kv_up/kernel: dimension 'heads' of size 4 must divide over tensor",
        ),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_its_parameter(axis, size, named):
    with pytest.raises(ValueError, match=named):
        rules.specs(boxed(), SHAPE | {axis: size})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([("embed", None)], "name dimension 'embed' twice"),
        ([("width", "rows")], "over axis 'rows', which is not one of data, pipe"),
    ],
)
def test_a_wrong_table_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        rules.table([*rules.RULES, *change])


def test_a_dimension_without_a_rule_is_refused_with_its_parameter():
    known = [rule for rule in rules.RULES if rule[0] != "latent"]
    with pytest.raises(ValueError, match="attention/.*'latent' is not in the rules"):
        rules.specs(boxed(), SHAPE, known)


def test_two_dimensions_on_one_axis_are_refused_with_their_parameter():
    changed = [(dim, "tensor" if dim == "embed" else axis) for dim, axis in rules.RULES]
    with pytest.raises(ValueError, match=r"embed.*share an axis: \['tensor', 'tensor'"):
        rules.specs(boxed(), SHAPE, changed)
