"""That `docs/numerics.md` says what a step compiled for H20s does."""

import pytest

from jmoe.plan import aot
from jmoe.plan.device import H20
from tests import numerics_programs

pytestmark = pytest.mark.hopper


@pytest.fixture(scope="module")
def found():
    devices = aot.absent_devices(H20, 16)
    return numerics_programs.found_in(devices, "bfloat16", "ragged")


def test_the_document_has_every_collective_and_its_dtypes(found):
    numerics_programs.assert_travels(found[0], "bfloat16 run")


def test_the_document_has_every_local_sum_function_and_cast(found):
    numerics_programs.assert_local(found[1], "bfloat16 run")
