"""What experts will have to do next, from what they had to.

Dimensions: T windows of time, L layers, E experts, A decays.
"""

import numpy as np
from numpy.typing import ArrayLike

from jmoe.balance import placement

_DECAYS = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95, 1.0)


def forecast(load_TLE: ArrayLike) -> np.ndarray:
    """Returns the load to expect next, float64 [L, E], from that of past windows.

    It is a mean with exponentially decaying weights, 1 for the last window, decay for
    the one before, and so on. What decay is best depends on whether loads differ by
    chance or because they drift; so each layer has the one by which its past windows
    were told best from those before them (of the shares that experts had, by their
    absolute differences). The last window alone is decay 0, the plain mean decay 1.

    Args:
      load_TLE: counts in windows of equal length, the last one last.

    Raises:
      ValueError: there is no window, or a load is negative or not finite.
    """
    load_TLE = placement.checked_load("load_TLE", load_TLE, 3)
    decay_A11 = np.array(_DECAYS)[:, None, None]
    sum_ALE, weight = np.zeros((len(_DECAYS), *load_TLE.shape[1:])), decay_A11 * 0
    error_AL = np.zeros(sum_ALE.shape[:2])
    for window, load_LE in enumerate(load_TLE):
        if window:
            error_ALE = np.abs(_shares(sum_ALE) - _shares(load_LE))
            error_AL += error_ALE.sum(-1) * load_LE.sum(-1)
        sum_ALE = decay_A11 * sum_ALE + load_LE
        weight = decay_A11 * weight + 1
    best_L = error_AL.argmin(0)
    return (sum_ALE / weight)[best_L, np.arange(len(best_L))]


def _shares(load: np.ndarray) -> np.ndarray:
    total = load.sum(-1, keepdims=True)
    return load / np.where(total > 0, total, 1)
