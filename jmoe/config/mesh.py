"""The mesh of devices that a run's steps are spread over, and its pipeline."""

import dataclasses
import math
from collections.abc import Mapping

from jmoe.config import checks

MESH_AXES = ("data", "pipe", "expert", "tensor")
ZERO_STAGES = (1, 3)
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "dualpipe", "dualpipe_v")
PIPELINE_REMATS = ("none", "stage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has, the outermost first.

    A batch is divided over `data` and `expert`, its positions over `tensor`; `expert`
    divides the routed experts, `tensor` heads, MLPs and vocabulary, `pipe` the layers.
    What `zero_stage` divides besides (ZeRO, arXiv 1910.02054): 1, the optimizer's
    moments and the float32 master weights; 3, the weights that are computed with too.
    """

    data: int = 1
    pipe: int = 1
    expert: int = 1
    tensor: int = 1
    zero_stage: int = 1

    def __post_init__(self):
        checks.at_least(self, data=1, pipe=1, expert=1, tensor=1)
        checks.one_of(self, zero_stage=ZERO_STAGES)
        if self.zero_stage == 3 and self.pipe > 1:
            raise ValueError(
                f"zero_stage=3 must be 1 with pipe={self.pipe}: a pipeline visits its "
                "layers once for each microbatch, and would gather them as often."
            )

    @classmethod
    def parse(cls, spec: str) -> "MeshConfig":
        """Returns the mesh that, say, "data=2,expert=4,tensor=2" describes.

        Other axes have 1 device.

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
        """How many devices each axis has, in the order of `MESH_AXES`."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape.values())

    @property
    def batch_parts(self) -> int:
        """Into how many parts a microbatch's sequences are divided."""
        return self.data * self.expert


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How microbatches go through the stages of a mesh with `pipe` above 1.

    See `jmoe.parallel.schedule`. microbatches: into how many a step's sequences are
    divided; None: as many as gradients are accumulated over. remat: what a microbatch
    leaves behind on its way forward, none: all that the model's own `remat` stores;
    stage: a stage's input, from which the backward pass begins with a forward one.
    """

    schedule: str = "1f1b"
    microbatches: int | None = None
    chunks: int = 2  # stages a rank, of interleaved_1f1b
    remat: str = "none"

    def __post_init__(self):
        checks.one_of(self, schedule=SCHEDULES, remat=PIPELINE_REMATS)
        checks.at_least(self, chunks=2)
        if self.microbatches is not None:
            checks.at_least(self, microbatches=1)
