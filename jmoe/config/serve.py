"""How a model is served: its engine, its replicas, and where requests arrive."""

import dataclasses

from jmoe.config import checks
from jmoe.config.model import DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Experts placed on devices by their measured load, and moved as it changes."""

    window_steps: int = 1000  # over which the load is measured
    interval_steps: int = 3000  # from one placement to the next
    redundant_experts: int = 0  # second copies of busy experts, in all

    def __post_init__(self):
        checks.at_least(self, window_steps=1, interval_steps=1, redundant_experts=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One replica's engine; what is None is chosen by the device."""

    dtype: str | None = None  # float32 on CPUs, elsewhere that of the checkpoint
    tensor_parallel: int = 1  # devices that share each layer
    pipeline_parallel: int = 1  # groups of layers, each on devices of its own
    expert_parallel: bool = False  # whole experts on devices, not a slice of each
    placement: PlacementConfig | None = None  # of experts, with expert_parallel
    draft_tokens: int = 0  # that MTP modules guess a step, for the model to verify
    max_length: int | None = None  # of prompt and answer; the model's max_positions
    max_sequences: int = 64  # computed at a time
    cache_gib: float | None = None  # keys and values; 1 on CPUs, elsewhere what is free
    compiled: bool | None = None  # on CPUs not, which starts much sooner

    def __post_init__(self):
        checks.at_least(
            self,
            tensor_parallel=1,
            pipeline_parallel=1,
            draft_tokens=0,
            max_sequences=1,
        )
        checks.one_of(self, dtype=(None, *DTYPES))
        checks.finite(self, "cache_gib")
        if self.max_length is not None:
            checks.at_least(self, max_length=2)
        if self.cache_gib is not None and not self.cache_gib > 0:
            raise ValueError(f"cache_gib={self.cache_gib} must be above 0.")
        if self.placement is not None and not self.expert_parallel:
            raise ValueError("placement needs expert_parallel=True.")

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Replicas of one model behind one address.

    With `max_replicas` above `min_replicas` their number follows the load: there are
    as many as it takes to give each about `requests_per_replica` at a time.
    """

    name: str = ""  # of the model in requests; by default its directory's
    host: str = "127.0.0.1"
    port: int = 8000
    min_replicas: int = 1
    max_replicas: int = 1
    requests_per_replica: int = 32
    drain_seconds: float = 300.0  # that requests in flight have left after SIGTERM
    engine: EngineConfig = EngineConfig()

    def __post_init__(self):
        checks.at_least(
            self,
            port=1,
            min_replicas=1,
            max_replicas=self.min_replicas,
            requests_per_replica=1,
            drain_seconds=0.0,
        )
        checks.at_most(self, port=65_535)
