"""Programs are freed before they take more mappings than the kernel gives a process."""

import logging

import jax
import jax.numpy as jnp
import pytest

from jmoe.train import compiled


@pytest.fixture
def set_limit(tmp_path, monkeypatch):
    """Makes the kernel's limit so many times the mappings that there are."""

    def limit(times: float) -> None:
        path = tmp_path / "max_map_count"
        path.write_text(f"{int(compiled.count_mappings() * times)}\n")
        monkeypatch.setattr(compiled, "LIMIT", path)

    return limit


@pytest.fixture
def program():
    """A compiled function."""

    @jax.jit
    def double(x):
        return 2 * x

    double(jnp.ones(3))
    assert double._cache_size() == 1
    return double


def test_programs_are_freed_above_the_share_and_work_again(set_limit, program, caplog):
    before = compiled.count_mappings()
    set_limit(1.9)
    with caplog.at_level(logging.WARNING):
        assert compiled.make_room()
    assert program._cache_size() == 0 and compiled.count_mappings() < before
    (record,) = caplog.records
    assert "SIGSEGV" in record.getMessage() and "\n" not in record.getMessage()
    assert "sysctl -w vm.max_map_count=" in record.getMessage()
    assert program(jnp.ones(3)).tolist() == [2, 2, 2]


def test_programs_stay_below_the_share(set_limit, program, caplog):
    set_limit(3.0)
    assert not compiled.make_room()
    assert program._cache_size() == 1 and not caplog.records


def test_where_the_system_does_not_tell_programs_stay(program, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "LIMIT", tmp_path / "nothing")
    assert not compiled.make_room()
    monkeypatch.setattr(compiled, "MAPPINGS", tmp_path / "nothing")
    assert compiled.count_mappings() == 0 and program._cache_size() == 1
