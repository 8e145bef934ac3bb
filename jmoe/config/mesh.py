"""The mesh of devices that a run's steps are spread over."""

import dataclasses
import math
from collections.abc import Mapping

from jmoe.config import checks

MESH_AXES = ("data", "pipe", "expert", "tensor")
ZERO_STAGES = (1, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has, the outermost first.

    A batch is divided over `data` and `expert`, its positions over `tensor`; `expert`
    divides the routed experts, `tensor` heads, MLPs and vocabulary. What `zero_stage`
    divides besides (ZeRO, arXiv 1910.02054): 1, the optimizer's moments and the float32
    master weights; 3, the weights that are computed with too.
    """

    data: int = 1
    pipe: int = 1
    expert: int = 1
    tensor: int = 1
    zero_stage: int = 1

    def __post_init__(self):
        checks.at_least(self, data=1, pipe=1, expert=1, tensor=1)
        checks.one_of(self, zero_stage=ZERO_STAGES)
        if self.pipe != 1:
            raise ValueError(f"pipe={self.pipe} must be 1: there is no pipeline yet.")

    @classmethod
    def parse(cls, spec: str) -> "MeshConfig":
        """The mesh that "data=2,expert=4,tensor=2" describes; other axes have 1 device.

        Raises:
          ValueError: an item isn't axis=devices, or an axis is unknown or there twice.
        """
        sizes: dict[str, int] = {}
        for item in filter(None, spec.split(",")):
            axis, _, size = item.strip().partition("=")
            if axis not in MESH_AXES or axis in sizes or not size.isdecimal():
                raise ValueError(
                    f"mesh={spec!r}: {item.strip()!r} must read axis=devices, with "
                    f"each axis of {', '.join(MESH_AXES)} at most once."
                )
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def shape(self) -> Mapping[str, int]:
        """Devices of each axis, in the order of `MESH_AXES`."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape.values())

    @property
    def batch_parts(self) -> int:
        """Into how many parts a microbatch's sequences are divided."""
        return self.data * self.expert
