"""A whole run: model, data, optimizer, and the horizon of its schedules.

Schedules are counted in optimizer steps (`jmoe.train.schedules`); what DeepSeek-V3
counts in tokens becomes a fraction of the steps that they are planned over, so that a
shortened run keeps its form.
"""

import dataclasses

from jmoe.config import checks
from jmoe.config.data import DataConfig
from jmoe.config.mesh import MeshConfig, PipelineConfig
from jmoe.config.model import ROUTERS, ModelConfig
from jmoe.config.monitor import MonitorConfig
from jmoe.config.train import TrainConfig

SCHEDULES = ("constant", "cosine", "wsd", "multi_step")
BEYOND = ("refuse", "hold")
# Those of an imported run are in its workdir, and nowhere else.
INITIAL_WEIGHTS = ("random", "imported")
OPTIMIZERS = ("adamw", "muon")
MOMENT_DTYPES = ("float32", "bfloat16")
MUON_SCALES = ("rms", "spectral")
# Up to here, a step forgets at least a unit in a bfloat16 moment's last place.
MAX_BFLOAT16_BETA = 1 - 2**-7
# In which linear layers and experts multiply: the activations' own dtype, or FP8 by one
# of the recipes of `jmoe.ops.fp8`.
PRECISIONS = (
    "native",
    "fp8",
    "fp8_power_of_two",
    "fp8_tensor",
    "fp8_square_gradients",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, then one of `SCHEDULES`.

    `multi_step` is DeepSeek-V3's (section 4.2): constant, a cosine to `end_fraction` of
    the peak, constant there, and a last constant stretch at `tail_fraction`.
    `boundaries` are the ends of those first three stretches, as fractions of the
    horizon.
    """

    name: str = "cosine"
    peak: float = 2.2e-4
    warmup_steps: int = 0
    end_fraction: float = 0.1
    decay_fraction: float = 0.2  # wsd: share of the run spent decaying at the end
    boundaries: tuple[float, float, float] = (0.676, 0.966, 0.989)  # 10, 14.3, 14.63 T
    tail_fraction: float = 7.3e-6 / 2.2e-4

    def __post_init__(self):
        checks.one_of(self, name=SCHEDULES)
        checks.at_least(
            self,
            peak=0.0,
            warmup_steps=0,
            end_fraction=0.0,
            tail_fraction=0.0,
            decay_fraction=0.0,
        )
        checks.at_most(self, end_fraction=1.0, tail_fraction=1.0, decay_fraction=1.0)
        if not 0 <= self.boundaries[0] <= self.boundaries[1] <= self.boundaries[2] <= 1:
            raise ValueError(f"boundaries={self.boundaries} must rise between 0 and 1.")

    def first_turn(self, horizon: int) -> int:
        """Returns the last step that the warm-up may end at.

        There the rate begins to fall.
        """
        turns = {
            "wsd": horizon - max(round(self.decay_fraction * horizon), 1),
            "multi_step": round(self.boundaries[0] * horizon),
        }
        return turns.get(self.name, horizon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HorizonConfig:
    """The steps that learning rate, bias rate and MTP weight are planned over.

    They stay what a run began with when it goes on with other `train.steps`, unless it
    is told otherwise. beyond: what becomes of steps beyond them; refuse: there may be
    none; hold: each schedule keeps the value of its last step.
    """

    steps: int | None = None  # None: train.steps
    beyond: str = "refuse"

    def __post_init__(self):
        checks.one_of(self, beyond=BEYOND)
        if self.steps is not None:
            checks.at_least(self, steps=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon after a clip by global norm; norms and biases never decay.

    beta1, beta2 and epsilon are AdamW's; Muon has it for what is no hidden matrix.
    muon_scale: what its steps are scaled to, rms: the root mean square of AdamW's, so
    that one `peak` suits both (arXiv 2502.16982); spectral: the same change of outputs
    at every width. moment_dtype: of what is kept between steps.
    """

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # inf: no clipping
    moment_dtype: str = "float32"
    muon_scale: str = "rms"
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self):
        checks.one_of(
            self,
            name=OPTIMIZERS,
            moment_dtype=MOMENT_DTYPES,
            muon_scale=MUON_SCALES,
        )
        checks.at_least(self, beta1=0.0, beta2=0.0, epsilon=0.0, weight_decay=0.0)
        checks.at_most(self, beta1=0.9999999, beta2=0.9999999)
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be above 0.")
        if self.moment_dtype == "bfloat16":
            self._check_bfloat16_moments()

    def _check_bfloat16_moments(self) -> None:
        """Refuses a moment whose steps are rounded away: it stays at what it was.

        Above the limit, one that averages ever smaller gradients stops falling while it
        is more than twice too large, and near 1 it stops at once.
        """
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            if value > MAX_BFLOAT16_BETA:
                raise ValueError(
                    f"{field}={value} must be at most {MAX_BFLOAT16_BETA} with "
                    "moment_dtype='bfloat16': closer to 1, a moment's steps are less "
                    "than bfloat16's last place, and rounding undoes them. "
                    "moment_dtype='float32' is for any."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result; written to `config.json` beside it."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: HorizonConfig = HorizonConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    precision: str = "native"
    initial_weights: str = "random"
    monitor: MonitorConfig = MonitorConfig()

    def __post_init__(self):
        checks.one_of(self, precision=PRECISIONS, initial_weights=INITIAL_WEIGHTS)
        if (
            not self.name.isprintable()
            or self.name in ("", ".", "..")
            or (set(self.name) & set("/\\"))
        ):
            raise ValueError(
                f"name={self.name!r} must be the name of a directory: printable, and "
                "without slashes."
            )
        length, limit = self.data.sequence_length, self.model.max_positions
        if length > limit:
            raise ValueError(
                f"data.sequence_length={length} exceeds model.max_positions={limit}."
            )
        parts = self.mesh.batch_parts
        if self.train.microbatch_size % parts:
            raise ValueError(
                f"train.microbatch_size={self.train.microbatch_size} must divide over "
                f"mesh.data={self.mesh.data} x mesh.expert={self.mesh.expert} = {parts}"
                " devices."
            )
        if length % self.mesh.tensor:
            raise ValueError(
                f"data.sequence_length={length} must divide over "
                f"mesh.tensor={self.mesh.tensor} devices."
            )
        if self.model.mtp_depth >= length:
            raise ValueError(
                f"model.mtp_depth={self.model.mtp_depth} leaves nothing to predict in "
                f"data.sequence_length={length}."
            )
        self._check_schedules()
        self._check_bias_rates()
        kind = self.model.moe.router.kind
        if self.train.reassign_every and ROUTERS[kind].by_experts:
            raise ValueError(
                f"train.reassign_every={self.train.reassign_every} must be 0 with "
                f"model.moe.router.kind={kind!r}, which loads all experts alike."
            )
        if self.mesh.pipe > 1:
            self._check_pipeline()

    @property
    def horizon(self) -> int:
        """The steps that schedules are planned over."""
        given = self.schedule.steps
        return self.train.steps if given is None else given

    def _check_schedules(self) -> None:
        horizon, train = self.horizon, self.train
        if train.steps > horizon and self.schedule.beyond == "refuse":
            raise ValueError(
                f"train.steps={train.steps} exceeds schedule.steps={horizon}, which "
                "learning rate, bias rate and MTP weight are planned over. Either "
                "schedule.beyond=hold keeps their last values, or "
                f"schedule.steps={train.steps} plans them anew."
            )
        planned = f"the {horizon} steps that schedules are planned over"
        schedule = self.optimizer.schedule
        turn = schedule.first_turn(horizon)
        if schedule.warmup_steps > turn:
            raise ValueError(
                f"optimizer.schedule.warmup_steps={schedule.warmup_steps} must be at "
                f"most {turn}: there {schedule.name!r} first turns, of {planned} "
                "(schedule.steps)."
            )
        begins = max(train.ramp)
        if begins > horizon:
            raise ValueError(
                f"train.ramp_steps={begins} must be at most {planned} (schedule.steps)."
            )

    def _check_bias_rates(self) -> None:
        names = self.model.moe_layer_names
        for i, rate in enumerate(self.train.bias_rate_factors):
            if not any(map(rate.matches, names)):
                raise ValueError(
                    f"train.bias_rate_factors[{i}].layers={rate.layers!r} matches none "
                    f"of the layers with experts, {names[0]} to {names[-1]}."
                )

    def _check_pipeline(self) -> None:
        if self.model.layer_loop != "scan":
            raise ValueError(
                f"model.layer_loop={self.model.layer_loop!r} must be 'scan' with "
                f"mesh.pipe={self.mesh.pipe}: stages are cut from stacks of layers."
            )
        train, microbatches = self.train, self.pipeline.microbatches
        if microbatches is None:
            return
        for accumulated in train.ramp.values():
            size = accumulated * train.microbatch_size
            sequences = size // self.mesh.batch_parts
            if microbatches % accumulated or sequences % microbatches:
                raise ValueError(
                    f"pipeline.microbatches={microbatches} must be a multiple of the "
                    f"{accumulated} that train.microbatch_size={train.microbatch_size} "
                    f"makes, and divide the {sequences} sequences that each part of a "
                    f"batch of {size} has."
                )
