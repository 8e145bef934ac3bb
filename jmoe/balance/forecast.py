"""What experts will have to do next, from what they had to.

Dimensions: T windows of time, L layers, E experts, A decays, B shrinkages.
"""

import numpy as np
from numpy.typing import ArrayLike

from jmoe.balance import placement

_DECAYS = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95, 1.0)
_SHRINKAGES = (0.0, 0.25, 0.5, 0.75, 1.0)


def forecast(load_TLE: ArrayLike) -> np.ndarray:
    """Returns the load to expect next, float64 [L, E], from that of past windows.

    It is a mean over the windows with exponentially decaying weights, 1 for the last
    window, decay for the one before, and so on; and of that a part, the shrinkage, is
    spread evenly over the layer's experts. What decay is best depends on whether loads
    differ by chance or because they drift, and what shrinkage on whether something
    pulls them to their mean, as a router's bias does. So each layer has those by which
    its past windows were told best from the windows before them (by the absolute errors
    of the experts' shares, weighed by the window's load). Decay 0 is the last window
    alone, decay 1 the plain mean, and shrinkage 1 the same for all experts.

    Args:
      load_TLE: counts in windows of equal length, the last one last.

    Raises:
      ValueError: there is no window, or a load is negative or not finite.
    """
    load_TLE = placement.checked_load("load_TLE", load_TLE, 3)
    num_layers, num_experts = load_TLE.shape[1:]
    decay_A = np.array(_DECAYS)
    shrinkage_B11 = np.array(_SHRINKAGES)[:, None, None]

    def shrunk(load_ALE: np.ndarray) -> np.ndarray:
        mean_AL1 = load_ALE.mean(-1, keepdims=True)
        return load_ALE[:, None] + shrinkage_B11 * (mean_AL1 - load_ALE)[:, None]

    sum_ALE, weight_A = np.zeros((len(decay_A), num_layers, num_experts)), 0 * decay_A
    error_ABL = np.zeros((len(_DECAYS), len(_SHRINKAGES), num_layers))
    for window, load_LE in enumerate(load_TLE):
        if window:
            error_ABLE = _shares(shrunk(sum_ALE)) - _shares(load_LE)
            error_ABL += np.abs(error_ABLE).sum(-1) * load_LE.sum(-1)
        sum_ALE = decay_A[:, None, None] * sum_ALE + load_LE
        weight_A = decay_A * weight_A + 1
    best_L = error_ABL.reshape(-1, num_layers).argmin(0)
    mean_ALE = sum_ALE / weight_A[:, None, None]
    options = shrunk(mean_ALE).reshape(-1, num_layers, num_experts)
    return options[best_L, np.arange(num_layers)]


def _shares(load: np.ndarray) -> np.ndarray:
    total = load.sum(-1, keepdims=True)
    return load / np.where(total > 0, total, 1)
