"""That `docs/numerics.md` says what a step compiled for CPUs does."""

import jax
import pytest

from jmoe.plan import numerics
from tests import numerics_programs
from tests.numerics_programs import found_in, table, words


@pytest.fixture(scope="module")
def found():
    return found_in(jax.devices(), "float32", "blocks")


def test_the_document_has_every_collective_and_its_dtypes(found):
    numerics_programs.assert_travels(found[0], "float32 run")


def test_the_document_has_every_local_sum_function_and_cast(found):
    numerics_programs.assert_local(found[1], "float32 run")


def test_no_row_stands_twice():
    for title, columns in numerics_programs.KEYS.items():
        rows = [tuple(row[column] for column in columns) for row in table(title)]
        assert len(set(rows)) == len(rows)


def test_a_sum_in_bfloat16_is_told_from_one_in_float32():
    text = """
%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %c = bf16[] add(%a, %b)
}
ENTRY %main (x: f32[8]) -> bf16[] {
  %x = f32[8]{0} parameter(0)
  %zero = bf16[] constant(0)
  %y = bf16[8]{0} convert(%x), metadata={op_name="jit(f)/moe/router/convert"}
  ROOT %r = bf16[] reduce(%y, %zero), to_apply=%add, metadata={op_name="jit(f)/sum"}
}
"""
    assert numerics.local(text) == {
        numerics.Local("elsewhere", "sum", "bfloat16"),
        numerics.Local("router", "cast from float32", "bfloat16"),
    }
    assert words("int32, float32") == {"float32", "int32"} and words("none") == set()
