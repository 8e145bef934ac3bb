"""Does between an engine's steps what a controller decides of them.

    pilot = Pilot(cfg, tell=print)
    engine = Engine(..., observe=pilot)
    pilot.take(engine)

Load is measured over a window of steps (`jmoe.balance.controller`). Where experts get
other places, each step of decoding is followed by one of their way: so a step is later
by what it takes to move one expert to each device, at most, and nothing waits for all.
On several processes each has a pilot, and all decide alike: by times of the first.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jmoe.balance import controller
from jmoe.balance.controller import Action, ControllerState, Window
from jmoe.config.controller import ADMIT, PLACE, ControllerConfig
from jmoe.decode.engine import Engine
from jmoe.decode.on_mesh import OnMesh
from jmoe.decode.placing import Placing, begin_with, system
from jmoe.decode.stats import StepStats
from jmoe.parallel import processes

ABLE = (PLACE, ADMIT)


class Pilot:
    """What watches an engine's steps and acts on them, in the engine's thread.

    stalls: the seconds by which each step of the last way made decoding later.

    Args:
      tell: is told what is done, and when experts have arrived.

    Raises:
      ValueError: an action is asked for that no engine can take.
    """

    def __init__(self, cfg: ControllerConfig, tell: Callable[[Action], None]):
        for action in cfg.actions:
            if action not in ABLE:
                raise ValueError(
                    f"actions has {action!r}: an engine takes "
                    f"{' and '.join(map(repr, ABLE))} while it runs."
                )
        self._cfg, self._tell = cfg, tell
        self._engine: Engine | None = None
        self._steps: list[StepStats] = []
        self._waits: list[float] = []
        self.stalls: list[float] = []
        self._moved = 1  # experts, on the last way

    def take(self, engine: Engine) -> None:
        """Begins to act on an engine, which tells this of its steps."""
        self._engine = engine
        placing = self._placing
        self._system = system(engine.cfg, placing.devices if placing else 1)
        found = placing.placement if placing else begin_with(engine.cfg, 1)
        self._state = ControllerState(found)

    @property
    def _placing(self) -> Placing | None:
        programs = self._engine.programs if self._engine else None
        return programs.placing if isinstance(programs, OnMesh) else None

    def __call__(self, stats: StepStats) -> None:
        """Takes what a step did, and does what follows from it."""
        if self._engine is None:
            return
        placing = self._placing
        self._steps.append(stats)
        self._waits.append(self._engine.longest_wait)
        if placing is not None and placing.steps_left:
            assert isinstance(self._engine.programs, OnMesh)
            self.stalls.append(self._engine.programs.advance(1))
            if not placing.steps_left:
                self._tell(self._arrived())
        elif len(self._steps) >= self._cfg.window_steps:
            self._decide()

    def _decide(self) -> None:
        decide = controller.decide
        given = self._cfg, self._system, self._state, self._window()
        self._state, actions = decide(*given)
        self._steps, self._waits = [], []
        for action in actions:
            self._apply(action)
            self._tell(action)

    def _apply(self, action: Action) -> None:
        assert self._engine is not None
        if action.kind == ADMIT:
            most: Any = action.value
            queue = self._engine.limits.queue
            self._engine.most_waiting = queue if most is None else min(most, queue)
        if action.kind == PLACE:
            assert self._placing is not None, "on one device nothing is uneven"
            self.stalls = []
            self._moved = self._placing.begin(action.value)

    def _window(self) -> Window:
        seconds = [stats.seconds for stats in self._steps]
        measured = {
            "seconds": sum(seconds),
            "slowest": float(np.percentile(seconds, 99)),
            "waiting": float(np.mean([stats.waiting for stats in self._steps])),
            "wait": max(self._waits),
            "move_seconds": sum(self.stalls) / self._moved,
        }
        told = processes.from_first("what was measured", lambda: measured)
        count_LE = np.sum([stats.count_LE for stats in self._steps], axis=0)
        return Window(steps=len(self._steps), count_LE=count_LE, **told)

    def _arrived(self) -> Action:
        stalls = 1e3 * np.array(self.stalls)
        steps = 1e3 * np.percentile([stats.seconds for stats in self._steps], 99)
        return Action(
            PLACE,
            f"experts have arrived, in {len(stalls)} steps",
            f"each was later by {stalls.mean():.3g} ms, {stalls.max():.3g} at most; 99 "
            f"of 100 took no more than {steps:.3g} ms",
            self._state.placement,
        )
