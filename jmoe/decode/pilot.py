"""Does between an engine's steps what a controller decides of them.

    pilot = Pilot(cfg, tell=print)
    engine = Engine(..., observe=pilot)
    pilot.take(engine)

Load is measured over a window of steps (`jmoe.balance.controller`). Where experts get
other places, each step of decoding is followed by one of their way: so a step is later
by what it takes to move one expert to each device, at most, and nothing waits for all.
To let tokens travel in FP8, the engine has a second set of programs, which is compiled
when it starts; the next step runs one of them. On several processes the pilot is
process 0's (`jmoe.decode.followers`).

What to do is thought about in a thread of its own, as it may take longer than a step.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jmoe.balance import controller
from jmoe.balance.controller import Action, ControllerState, Window
from jmoe.balance.copies import CopyStep
from jmoe.config.controller import ADMIT, DROP, FP8, PLACE, ControllerConfig
from jmoe.config.model import FLOAT8
from jmoe.decode.engine import Engine
from jmoe.decode.placing import Placing, begin_with, system
from jmoe.decode.stats import StepStats
from jmoe.parallel.shedding import NO_LIMIT

MOVED = "moved"  # the kind of what is told when experts have arrived: how many have


@runtime_checkable
class Steerable(Protocol):
    """Programs of a mesh, whose ways can change while they run.

    As `jmoe.decode.on_mesh.OnMesh` has it.
    """

    placing: Placing | None
    may_drop: bool

    @property
    def dispatch_dtype(self) -> str: ...

    @property
    def dispatch_dtypes(self) -> tuple[str, ...]: ...

    def advance(self, steps: int) -> float: ...

    def set_limit(self, limit: int) -> None: ...

    def set_dispatch_dtype(self, dtype: str) -> None: ...


class _Thought(NamedTuple):
    """What to remember, what to do, and the experts' ways if they get other places."""

    state: ControllerState
    actions: list[Action]
    ways: list[list[CopyStep]]


class Pilot:
    """What watches an engine's steps and acts on them, in the engine's thread.

    stalls: the seconds by which each step of the last way made decoding later.

    Args:
      tell: is told what is done, and when experts have arrived.
      thinks: runs what decides and plans; None: a thread.
    """

    def __init__(
        self,
        cfg: ControllerConfig,
        tell: Callable[[Action], None],
        thinks: concurrent.futures.Executor | None = None,
    ):
        self._cfg, self._tell = cfg, tell
        self._thinks = thinks or concurrent.futures.ThreadPoolExecutor(1, "pilot")
        self._thought: concurrent.futures.Future[_Thought] | None = None
        self._engine: Engine | None = None
        self._steps: list[StepStats] = []
        self._waits: list[float] = []
        self.stalls: list[float] = []
        self._moved = 1  # experts, on the last way

    def take(self, engine: Engine) -> None:
        """Begins to act on an engine, which tells this of its steps.

        Raises:
          ValueError: there is an action for which its programs weren't made.
        """
        programs = engine.programs
        may_drop, may_go_as = False, ()
        if isinstance(programs, Steerable):
            may_drop, may_go_as = programs.may_drop, programs.dispatch_dtypes[1:]
        if DROP in self._cfg.actions and not may_drop:
            raise ValueError(
                "actions has 'drop', but the engine's programs were made without a "
                "limit of a device's choices."
            )
        if FP8 in self._cfg.actions and FLOAT8 not in may_go_as:
            raise ValueError(
                "actions has 'fp8', but the engine's programs were made without a "
                f"second form in which tokens travel to experts, {FLOAT8!r}."
            )
        self._engine = engine
        placing = self._placing
        self._system = system(engine.cfg, placing.devices if placing else 1)
        found = placing.placement if placing else begin_with(engine.cfg, 1)
        self._state = ControllerState(found)

    @property
    def _placing(self) -> Placing | None:
        programs = self._engine.programs if self._engine else None
        return programs.placing if isinstance(programs, Steerable) else None

    def device_load(self, count_LE: np.ndarray) -> np.ndarray | None:
        """Returns the choices that each device computes; None: experts are in order."""
        return None if self._placing is None else self._placing.device_load(count_LE)

    @property
    def is_in_fp8(self) -> bool:
        """Whether tokens travel to experts in FP8."""
        programs = self._engine.programs if self._engine else None
        return isinstance(programs, Steerable) and programs.dispatch_dtype == FLOAT8

    def __call__(self, stats: StepStats) -> None:
        """Takes what a step did, and does what follows from it."""
        if self._engine is None:
            return
        placing = self._placing
        self._steps.append(stats)
        self._waits.append(self._engine.longest_wait)
        if placing is not None and placing.steps_left:
            assert isinstance(self._engine.programs, Steerable)
            self.stalls.append(self._engine.programs.advance(1))
            if not placing.steps_left:
                self._tell(self._arrived())
        elif self._thought is None and len(self._steps) >= self._cfg.window_steps:
            self._thought = self._thinks.submit(self._think, self._window())
            self._steps, self._waits = [], []
        if self._thought is not None and self._thought.done():
            thought, self._thought = self._thought.result(), None
            self._state = thought.state
            for action in thought.actions:
                self._apply(action, thought.ways)
                self._tell(action)

    def _think(self, window: Window) -> "_Thought":
        given = self._cfg, self._system, self._state, window
        state, actions = controller.decide(*given)
        wanted = [action.value for action in actions if action.kind == PLACE]
        placing, ways = self._placing, []
        if wanted:
            assert placing is not None, "on one device nothing is uneven"
            ways = placing.plan(*wanted)
        return _Thought(state, actions, ways)

    def _apply(self, action: Action, ways: list[list[CopyStep]]) -> None:
        assert self._engine is not None
        if action.kind == ADMIT:
            most: Any = action.value
            queue = self._engine.limits.queue
            self._engine.most_waiting = queue if most is None else min(most, queue)
        if action.kind == DROP:
            assert isinstance(self._engine.programs, Steerable), "see `take`"
            limit = NO_LIMIT if action.value is None else action.value
            self._engine.programs.set_limit(limit)
        if action.kind == FP8:
            assert isinstance(self._engine.programs, Steerable), "see `take`"
            usual, *_ = self._engine.programs.dispatch_dtypes
            self._engine.programs.set_dispatch_dtype(FLOAT8 if action.value else usual)
        if action.kind == PLACE:
            assert self._placing is not None, "as there is a way"
            self.stalls = []
            self._moved = max(self._placing.begin(ways), 1)

    def _window(self) -> Window:
        seconds = [stats.seconds for stats in self._steps]
        measured = {
            "seconds": sum(seconds),
            "slowest": float(np.percentile(seconds, 99)),
            "waiting": float(np.mean([stats.waiting for stats in self._steps])),
            "wait": max(self._waits),
            "move_seconds": sum(self.stalls) / self._moved,
        }
        count_LE = np.sum([stats.count_LE for stats in self._steps], axis=0)
        return Window(steps=len(self._steps), count_LE=count_LE, **measured)

    def _arrived(self) -> Action:
        stalls = 1e3 * np.array(self.stalls)
        seconds = [stats.seconds for stats in self._steps]
        steps = 1e3 * np.percentile(seconds, 99)
        return Action(
            MOVED,
            f"experts have arrived, in {len(stalls)} steps",
            f"each was later by {stalls.mean():.3g} ms, {stalls.max():.3g} at most; 99 "
            f"of 100 took no more than {steps:.3g} ms",
            self._moved,
        )
