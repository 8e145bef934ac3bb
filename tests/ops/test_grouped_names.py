"""Which backends there are, and which one is the platform's."""

import jax

from jmoe.config import model
from jmoe.ops import grouped


def test_the_config_knows_the_same_backends():
    assert ("auto", *grouped.BACKENDS) == model.EXPERT_BACKENDS


def test_the_backend_is_the_platforms_unless_one_is_named(monkeypatch):
    assert grouped.backend_name("auto") == "blocks"
    assert {grouped.backend_name(name) for name in grouped.BACKENDS} == {
        *grouped.BACKENDS
    }
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert grouped.backend_name("auto") == "ragged"
