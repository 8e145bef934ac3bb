"""When measured load leads to a decision, and to which (`jmoe.balance.controller`)."""

import dataclasses
import math

from jmoe.config import checks

PLACE, DROP, FP8, ADMIT = ACTIONS = ("place", "drop", "fp8", "admit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """What may be done about load, and the thresholds that it takes.

    actions: of "place" (other devices for experts), "drop" (an overloaded device's
      least important choices), "fp8" (tokens travel to experts in FP8), and "admit"
      (fewer requests wait).
    above, below: shares of a limit. What is done about it begins above the one, and
      ends below the other.
    device_rows: the limit of the choices that a device computes in a layer of a step,
      for "drop". step_seconds: of the time that steps take, but for the slowest in a
      hundred, for "fp8". wait_seconds: of the time for which requests wait for a slot,
      for "admit". None: there is no limit, and nothing is done about it.
    uneven_above: by how much the busiest device exceeds the mean before experts are
      placed anew; uneven_below: by how much it may after that.
    window_steps: over which load is measured. cool_down: windows, at least, from one
      decision to the next of its kind.
    horizon_steps: in which a placement must win more time than its moves take.
    expert_share: of a step's time that is its experts'.
    """

    actions: tuple[str, ...] = (PLACE, ADMIT)
    above: float = 0.9
    below: float = 0.7
    device_rows: int | None = None
    step_seconds: float | None = None
    wait_seconds: float | None = None
    uneven_above: float = 0.1
    uneven_below: float = 0.03
    window_steps: int = 64
    cool_down: int = 4
    horizon_steps: int = 4096
    expert_share: float = 0.5

    def __post_init__(self):
        for action in self.actions:
            if action not in ACTIONS:
                raise ValueError(
                    f"actions has {action!r}, which is not one of "
                    f"{', '.join(map(repr, ACTIONS))}."
                )
        checks.at_least(self, window_steps=1, cool_down=1, horizon_steps=1)
        checks.above_zero(self, "step_seconds", "wait_seconds")
        if self.device_rows is not None:
            checks.at_least(self, device_rows=1)
        for low, high in (("below", "above"), ("uneven_below", "uneven_above")):
            least, most = getattr(self, low), getattr(self, high)
            if not 0 <= least < most < math.inf:
                raise ValueError(
                    f"{low}={least} must be at least 0 and below {high}={most}: what "
                    "begins above one threshold ends below a lower one."
                )
        if not 0 < self.expert_share <= 1:
            raise ValueError(
                f"expert_share={self.expert_share} must be above 0 and at most 1."
            )


SERVING = ControllerConfig()
TRAINING = ControllerConfig(actions=())
