"""Forecasts, on loads that are noise around something that stays, drifts or jumps."""

import numpy as np
import pytest

from jmoe.balance import placement
from jmoe.balance.forecast import forecast

L, E, T = 3, 64, 24


def rates(kind, rng):
    """Returns what experts are chosen with in T + 1 windows, [T + 1, L, E]."""
    step_TLE = rng.normal(size=(T + 1, L, E))
    step_TLE[1:] *= {"stays": 0.0, "drifts": 0.05, "wanders": 0.4, "jumps": 0.0}[kind]
    rate_TLE = np.exp(np.cumsum(step_TLE, axis=0))
    if kind == "jumps":
        rate_TLE[T // 2 :] = np.exp(rng.normal(size=(L, E)))
    return rate_TLE / rate_TLE.sum(-1, keepdims=True)


def drawn(kind, seed, tokens=4000):
    rng = np.random.default_rng(seed)
    rate_TLE = rates(kind, rng)
    return rng.multinomial(tokens, rate_TLE[:T]), rate_TLE[T]


def error(load_LE, rate_LE):
    return np.abs(load_LE / load_LE.sum(-1, keepdims=True) - rate_LE).sum(-1).mean()


@pytest.mark.parametrize(
    ("kind", "gain"),
    [("stays", 0.4), ("drifts", 0.8), ("jumps", 0.85), ("wanders", 1.02)],
)
def test_a_forecast_is_nearer_than_the_last_window_or_as_near(kind, gain):
    pairs = [drawn(kind, seed) for seed in range(8)]
    ours = np.mean([error(forecast(load), rate) for load, rate in pairs])
    last = np.mean([error(load[-1], rate) for load, rate in pairs])
    mean = np.mean([error(load.mean(0), rate) for load, rate in pairs])
    assert ours < gain * last
    assert ours < 1.02 * mean


def test_experts_placed_by_a_forecast_are_better_balanced_than_by_the_last_window():
    busiest = {"forecast": [], "last": []}
    for seed in range(4):
        load_TLE, rate_LE = drawn("drifts", seed)
        guesses = {"forecast": forecast(load_TLE), "last": load_TLE[-1]}
        for name, load_LE in guesses.items():
            placed = placement.place(load_LE, 80, 1, 1, 16)
            busiest[name] += [placement.device_load(rate_LE, placed, 16).max(-1) * 16]
    assert np.mean(busiest["forecast"]) - 1 < 0.7 * (np.mean(busiest["last"]) - 1)


def test_what_never_changes_is_forecast_as_it_is_and_one_window_is_the_forecast():
    load_LE = np.random.default_rng(0).integers(0, 99, (L, E))
    for windows in (1, 2, 30):
        got_LE = forecast(np.stack([load_LE] * windows))
        np.testing.assert_allclose(got_LE, load_LE, rtol=1e-12)
    noise_TLE, _ = drawn("stays", 0)
    np.testing.assert_allclose(forecast(noise_TLE).sum(-1), noise_TLE[0].sum(-1))


def test_loads_that_something_pulls_to_their_mean_are_forecast_nearer_to_it():
    rng, load_TLE = np.random.default_rng(0), np.full((T, L, E), 100.0)
    for window in range(1, T):  # half of what was off comes back
        load_TLE[window] += (load_TLE[window - 1] - 100) / 2 + rng.normal(size=(L, E))
    next_LE = 100 + (load_TLE[-1] - 100) / 2
    off = {
        name: np.abs(guess_LE - next_LE).mean()
        for name, guess_LE in (
            ("forecast", forecast(load_TLE)),
            ("last", load_TLE[-1]),
            ("none", 100.0),
        )
    }
    assert off["forecast"] < 0.5 * min(off["last"], off["none"])


def test_layers_have_decays_of_their_own():
    parts = [drawn(kind, 0)[0] for kind in ("stays", "wanders")]
    together = forecast(np.concatenate(parts, axis=1))
    np.testing.assert_allclose(together, np.concatenate([*map(forecast, parts)]))


def test_windows_without_load_say_nothing_about_the_shares():
    load_TLE, _ = drawn("stays", 0)
    load_TLE[5] = 0
    assert not (forecast(load_TLE) == load_TLE[-1]).all()
    assert (forecast(load_TLE * 0) == 0).all()


def test_no_window_and_loads_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"load_TLE has the shape \(0, 3, 64\)"):
        forecast(np.zeros((0, L, E)))
    with pytest.raises(ValueError, match="load_TLE has -1.0; loads are at least 0"):
        forecast(np.full((2, L, E), -1))
