"""Which backend is the platform's."""

import jax
import pytest

from jmoe.ops import grouped


@pytest.mark.parametrize(("platform", "name"), [("cpu", "blocks"), ("gpu", "ragged")])
def test_by_default_the_backend_is_the_platforms(platform, name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    called = f"routed_mlp_{name}"
    monkeypatch.setattr(grouped, called, lambda *given, **options: (given, options))
    assert grouped.BACKENDS["auto"](1, 2, apart=True) == ((1, 2), {"apart": True})
