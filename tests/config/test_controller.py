"""A controller's record refuses thresholds that would make it restless."""

import pytest

from jmoe.config.controller import SERVING, TRAINING, ControllerConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": ("place", "dorp")}, "actions has 'dorp'.*'drop'"),
        ({"below": 0.9}, "below=0.9 must be at least 0 and below above=0.9"),
        ({"uneven_below": 0.2}, "uneven_below=0.2 .* uneven_above=0.1"),
        ({"uneven_above": float("inf")}, "uneven_above=inf"),
        ({"cool_down": 0}, "cool_down=0 must be at least 1"),
        ({"device_rows": 0}, "device_rows=0 must be at least 1"),
        ({"step_seconds": 0.0}, "step_seconds=0.0 must be above 0"),
        ({"expert_share": 1.5}, "expert_share=1.5 must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ControllerConfig(**changes)


def test_serving_places_and_admits_but_drops_nothing_and_training_does_nothing():
    assert set(SERVING.actions) == {"place", "admit"}
    assert TRAINING.actions == ()
