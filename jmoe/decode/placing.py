"""Where a decoder's experts live on a mesh, and how they move while it decodes.

A placement is data on the devices: beside each layer's weights are the places of its
experts' copies, to which the router's choices go. To get to another one, steps of the
way (`jmoe.balance.copies`) move weights of one row of layers and change its places,
between two steps of decoding. So what is computed stays the same, and no program is
compiled for it but the one that moves.

Shapes: L MoE layer, E expert, C copy of one, R place, P device, X rank of a pipeline.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jmoe.balance import copies, homes, placement
from jmoe.balance.controller import System, check
from jmoe.balance.copies import CopyStep
from jmoe.balance.placement import Placement
from jmoe.config import ModelConfig
from jmoe.decode.mesh_weights import PIPE, LayerRow, of_experts, with_experts
from jmoe.decode.weights import Weights
from jmoe.parallel import collectives
from jmoe.parallel import copies as copying
from jmoe.train.layout import WHOLE, Layout, on_mesh, put_whole


class RowMoves(NamedTuple):
    """What the layers of a row's ranks move, and where experts are behind it; int32.

    source_XP, target_XP: as `jmoe.balance.copies` has them.
    """

    source_XP: Any
    target_XP: Any
    home_XEC: Any


class Move(NamedTuple):
    """A step of the experts' way, in a row of layers; None: nothing, in a rank's."""

    row: int
    steps: tuple[CopyStep | None, ...]


def system(cfg: ModelConfig, devices: int) -> System:
    """Returns what a model's experts may be placed on."""
    router = cfg.moe.router
    nodes = homes.keeping_groups(router, devices).num_groups
    return System(devices, router.num_groups if nodes > 1 else 1, nodes)


def begin_with(cfg: ModelConfig, devices: int, spare: int = 0) -> Placement:
    """Returns the placement of experts that are equally busy.

    Args:
      spare: places beyond one for each expert, in which are copies.

    Raises:
      ValueError: the places don't divide over the devices.
    """
    shape = cfg.num_moe_layers, cfg.moe.router.num_experts
    own = system(cfg, devices)
    sizes = shape[1] + spare, own.groups, own.nodes, devices
    return placement.place(np.ones(shape), *sizes)


def make_mover(layout: Layout, specs: Any) -> Callable[[Any, RowMoves], Any]:
    """Returns what moves a row's experts (`mesh_weights.Experts`), which are donated.

    Args:
      specs: of the experts.
    """

    def move(experts: Any, moves: RowMoves) -> Any:
        rank = collectives.axis_index(PIPE)
        source_P, target_P, home_EC = (x[rank] for x in moves)

        def copy(x: jax.Array) -> jax.Array:
            return copying.copy(x[0], source_P, target_P)[None]

        weights = jax.tree.map(copy, experts.weights)
        return experts._replace(weights=weights, home=home_EC[None])

    on_all = on_mesh(move, layout, (specs, WHOLE), specs)
    # Moved arrays are said to lie as those did that came: so nothing is compiled anew.
    lie = jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), specs)
    return jax.jit(on_all, donate_argnums=0, out_shardings=lie)


class Placing:
    """The experts' places, and what is left of the way to others.

    Raises:
      ValueError: the placement is for another model, or another mesh.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        layout: Layout,
        rows: Sequence[LayerRow],
        move: Callable[[Any, RowMoves], Any],
        found: Placement,
    ):
        self._shape = cfg.num_moe_layers, cfg.moe.router.num_experts
        self._system = system(cfg, layout.mesh.shape["expert"])
        self._layout, self._move_row = layout, move
        check(found, self._shape, self._system)
        self._expert_LR = found.physical_to_logical.copy()
        self._placement: Placement | None = None
        self._layers = [row.moe_layers(cfg) for row in rows]
        self._left: collections.deque[Move] = collections.deque()

    @property
    def devices(self) -> int:
        """How many devices share the experts."""
        return self._system.devices

    @property
    def placement(self) -> Placement:
        """Where experts are now."""
        if self._placement is None:  # asked for after each step, and rarely another
            self._placement = placement.from_slots(self._expert_LR, self._shape[1])
        return self._placement

    def device_load(self, count_LE: np.ndarray) -> np.ndarray:
        """Returns the choices that each device computes, int [L, P], but for chance."""
        load_LP = placement.device_load(count_LE, self.placement, self.devices)
        return np.rint(load_LP).astype(np.int64)

    @property
    def steps_left(self) -> int:
        """How many steps there are to where experts are going."""
        return len(self._left)

    def plan(self, wanted: Placement) -> list[list[CopyStep]]:
        """Returns each layer's way to a placement from here.

        Another thread may call it, as long as nothing moves.

        Raises:
          ValueError: it is for another model, or has other places.
        """
        check(wanted, self._shape, self._system)
        held_LR, wanted_LR = self._expert_LR, wanted.physical_to_logical
        layers = zip(held_LR, wanted_LR, strict=True)
        return [copies.steps(*layer, self._system.devices) for layer in layers]

    def begin(self, ways: Sequence[Sequence[CopyStep]]) -> int:
        """Sets out on what was planned, and returns how many copies will move."""
        self._left.clear()
        for number, layers in enumerate(self._layers):
            own = [ways[layer] if layer >= 0 else [] for layer in layers]
            for nth in range(max(map(len, own))):
                steps = (way[nth] if nth < len(way) else None for way in own)
                self._left.append(Move(number, tuple(steps)))
        places = self._expert_LR.shape[1]
        return sum(int((step.target_P < places).sum()) for way in ways for step in way)

    def take(self, steps: int) -> list[Move]:
        """Returns the next steps of the way, of which so many are now to be made."""
        return [self._left.popleft() for _ in range(min(steps, len(self._left)))]

    def make(self, weights: Weights, moves: Iterable[Move]) -> Weights:
        """Returns the weights behind these steps, of this way or one like it.

        What moves experts elsewhere makes the same ones here.
        """
        self._placement = None
        for move in moves:
            for layer, step in zip(self._layers[move.row], move.steps, strict=True):
                if step is not None:
                    self._expert_LR[layer] = step.expert_R
            weights = self._move(weights, move)
        return weights

    def stay(self, weights: Weights) -> Weights:
        """Returns the weights as they are, moved by what is compiled for it here."""
        for number, layers in enumerate(self._layers):
            if max(layers) >= 0:
                weights = self._move(weights, Move(number, (None,) * len(layers)))
        return weights

    def _move(self, weights: Weights, move: Move) -> Weights:
        number, steps = move
        places = self._expert_LR.shape[1]
        nothing_P = np.full(self._system.devices, places, np.int32)
        # What a rank without a layer has is as good as any.
        expert_XR = self._expert_LR[list(self._layers[number])]
        moves = RowMoves(
            np.stack([nothing_P if s is None else s.source_P for s in steps]),
            np.stack([nothing_P if s is None else s.target_P for s in steps]),
            placement.from_slots(expert_XR, self._shape[1]).logical_to_physical,
        )
        layers = list(weights.layers)
        experts = of_experts(layers[number])
        moved = self._move_row(experts, put_whole(self._layout, moves))
        layers[number] = with_experts(layers[number], moved)
        return weights._replace(layers=tuple(layers))
