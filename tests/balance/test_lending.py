"""Plans of lending against what they promise, and choices against plans."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.balance import lending

PLAN = jax.jit(lending.plan, static_argnums=(1, 2, 3))
ASSIGN = jax.jit(lending.assign)
SHAPES = [(2, 4), (4, 8), (4, 16), (8, 16)]  # devices, experts


@st.composite
def loads(draw, devices, experts):
    """Counts of each device's choices: spread, of few experts, of one, or of none."""
    most = draw(st.sampled_from([0, 1, 7, 1000]))
    load_PE = draw(
        st.lists(
            st.lists(st.integers(0, most), min_size=experts, max_size=experts),
            min_size=devices,
            max_size=devices,
        )
    )
    load_PE = np.array(load_PE, np.int32)
    start = draw(st.integers(0, experts - 1))
    stop = draw(st.sampled_from([start + 1, start + 2, experts, experts]))
    chosen_E = np.isin(np.arange(experts), np.arange(start, stop))
    return np.where(chosen_E | (stop == experts), load_PE, 0)


def planned(load_PE, *args):
    return jax.tree.map(np.asarray, PLAN(load_PE, *args))


any_plan = functools.partial(
    pytest.mark.parametrize,
    ("shape", "slots", "threshold", "devices_per_node"),
    [
        (shape, slots, threshold, per_node)
        for shape, (slots, threshold), per_node in itertools.product(
            SHAPES[1:3], [(1, 0.0), (2, 0.1), (4, 0.0)], [None, 2]
        )
    ],
)


@any_plan()
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_row_is_computed_once_at_home_or_by_a_borrower(
    shape, slots, threshold, devices_per_node, data
):
    devices, experts = shape
    load_PE = data.draw(loads(devices, experts))
    got = planned(load_PE, slots, threshold, devices_per_node)
    np.testing.assert_array_equal(got.rows_EP.sum(1), load_PE.sum(0))
    assert (got.rows_EP >= 0).all()
    assert got.rows_EP.dtype == got.borrowed_PS.dtype == np.int32
    hosted = experts // devices
    for device, borrowed in enumerate(got.borrowed_PS.tolist()):
        own = range(device * hosted, (device + 1) * hosted)
        lent = [expert for expert in borrowed if expert < experts]
        assert borrowed == lent + [experts] * (slots - len(lent))
        assert len(lent) == len(set(lent)) and not set(lent) & set(own)
        computed = np.flatnonzero(got.rows_EP[:, device])
        assert set(computed) - set(own) == set(lent)
        rows = got.rows_EP[lent, device]
        assert (np.diff(rows) <= 0).all()
