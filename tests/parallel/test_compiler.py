"""Options that this version of XLA must know, or every step on GPUs would fail."""

import jax
import pytest

from jmoe.parallel import compiler


def test_xla_knows_the_options_for_gpus():
    ones = jax.numpy.ones(2)
    jitted = jax.jit(lambda x: x + 1, compiler_options=compiler.options("gpu"))
    assert jitted(ones).sum() == 4


def test_an_option_that_xla_does_not_know_would_be_noticed():
    jitted = jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such_thing": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_thing"):
        jitted(jax.numpy.ones(2))


def test_cpus_get_none():
    assert compiler.options("cpu") == {}
    assert compiler.options("gpu") == compiler.GPU_OPTIONS
