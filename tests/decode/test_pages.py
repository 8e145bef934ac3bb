"""Which pages are whose: none is two requests', and none is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.decode.pages import Pages


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_no_page_is_given_twice_and_none_is_lost(actions):
    pages, held = Pages(10), []
    for is_taking, number in actions:
        if is_taking:
            free, taken = pages.num_free, pages.take(number)
            assert (taken is None) == (number > free)
            if taken is not None:
                assert len(taken) == number
                held.append(taken)
        elif held:
            pages.give_back(held.pop(number % len(held)))
        every = [page for some in held for page in some]
        assert len(set(every)) == len(every) == 10 - pages.num_free
        assert set(every) <= set(range(10))


def test_a_page_that_is_free_cannot_be_given_back():
    pages = Pages(3)
    taken = pages.take(2)
    pages.give_back(taken)
    with pytest.raises(AssertionError, match="free already"):
        pages.give_back(taken)
