"""How a model is served: its engine, its replicas, and where requests arrive."""

import dataclasses

from jmoe.config import checks
from jmoe.config.controller import ControllerConfig
from jmoe.config.model import DTYPES

CPU_CACHE_GIB = 1.0  # of either engine
# Of the engine's fields that may be None.
_LEAST = {"max_length": 2, "prompt_tokens": 1, "queue": 0, "spare_experts": 0}
OPEN_ROUTES = ("/health", "/metrics", "/monitor")  # what may be asked without a key


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
    # And of jmoe's own engine only:
    weights: str | None = None  # native, fp8 or int4-experts
    prompt_tokens: int | None = None  # that a step reads of prompts, at most
    queue: int | None = None  # requests that may wait for a place; 256
    deadline_seconds: float | None = None  # that an answer may take; 600
    controller: ControllerConfig | None = None  # of load; places, and admits in time
    spare_experts: int | None = None  # with expert_parallel, places for copies; 0

    def __post_init__(self):
        checks.at_least(
            self,
            tensor_parallel=1,
            pipeline_parallel=1,
            draft_tokens=0,
            max_sequences=1,
        )
        checks.one_of(self, dtype=(None, *DTYPES))
        checks.above_zero(self, "cache_gib", "deadline_seconds")
        for field, least in _LEAST.items():
            if getattr(self, field) is not None:
                checks.at_least(self, **{field: least})
        if self.placement is not None and not self.expert_parallel:
            raise ValueError("placement needs expert_parallel=True.")

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one client may ask of the server, in bytes, in time and in work.

    On each machine clients can make it hold at most `connections` times `body_kib`.
    """

    connections: int = 1024  # open at a time on each machine
    header_kib: int = 32  # of a request's first line and headers
    header_seconds: float = 10.0  # until they are there
    body_kib: int = 2048  # of a request
    body_seconds: float = 30.0  # until it is there
    stall_seconds: float = 60.0  # that a client leaves sent bytes unread
    prompts: int = 64  # of one request
    choices: int = 16  # n and best_of
    new_tokens: int | None = None  # of an answer; what the engine's max_length leaves
    logprobs: int = 20  # alternatives to a token, as logprobs and its like ask for
    items: int = 1024  # of a list or map besides prompts and messages, such as stop

    def __post_init__(self):
        checks.at_least(
            self,
            connections=1,
            header_kib=1,
            body_kib=1,
            prompts=1,
            choices=1,
            logprobs=0,
            items=1,
        )
        checks.above_zero(self, "header_seconds", "body_seconds", "stall_seconds")
        if self.new_tokens is not None:
            checks.at_least(self, new_tokens=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Replicas of one model behind one address.

    With `max_replicas` above `min_replicas` their number follows the load: there are
    as many as it takes to give each about `requests_per_replica` at a time.

    Keys are read from `key_file`, one a line, or from the environment's JMOE_API_KEYS.
    With any, every request needs one but those for `open_routes`. Without, `host` must
    be this machine's own.
    """

    name: str = ""  # of the model in requests; by default its directory's
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: str | None = None
    open_routes: tuple[str, ...] = ("/health",)  # and others, where they may be read
    tls_certificate: str | None = None  # PEM files; with both, https and no http
    tls_key: str | None = None
    limits: LimitsConfig = LimitsConfig()
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
        for route in self.open_routes:
            if route not in OPEN_ROUTES:
                raise ValueError(
                    f"open_routes has {route!r}, which is not one of "
                    f"{', '.join(map(repr, OPEN_ROUTES))}."
                )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError(
                f"tls_certificate={self.tls_certificate!r} and tls_key={self.tls_key!r}"
                " must be given together."
            )
