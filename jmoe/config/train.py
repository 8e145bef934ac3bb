"""Steps and batches of a training run, and how often things happen."""

import dataclasses
import fnmatch

from jmoe.config import checks

# Of batches; each is a program of its own.
MOST_SIZES = 8
# What becomes of a run at a step that would spoil it; see TrainConfig.
ON_NONFINITE = ("stop", "skip", "roll_back")
ON_SPIKE = ("ignore", "skip", "roll_back", "stop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepwiseConfig:
    """A number that is `first` until `switch` of the run, then `last`.

    The bias rate (V3: 1e-3, then 0 for the last 500 of 14,800 billion tokens) and the
    weight of the MTP loss (V3: 0.3, then 0.1 after 10,000) are of this form.
    """

    first: float
    last: float
    switch: float = 1.0  # fraction of the horizon's steps

    def __post_init__(self):
        checks.at_least(self, first=0.0, last=0.0, switch=0.0)
        checks.at_most(self, switch=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRateConfig:
    """What the bias rate is multiplied by in some of the MoE layers.

    layers: a pattern, as of file names (`fnmatch`), of `ModelConfig.moe_layer_names`:
    `moe_0` is the first layer that has experts, `mtp_0` the first MTP module.
    """

    layers: str
    factor: float  # 0 freezes the biases

    def __post_init__(self):
        checks.at_least(self, factor=0.0)

    def matches(self, layer: str) -> bool:
        """Returns whether this is for the layer of that name."""
        return fnmatch.fnmatchcase(layer, self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batches and intervals. Batches count sequences, over all processes.

    on_nonfinite: what becomes of the run at a step whose loss or gradients aren't
    finite; on_spike: at one whose loss is a spike (`jmoe.train.guard`). skip: the step
    changes no parameter, moment or bias, and training goes on with the next batch;
    roll_back: the run goes back to the newest checkpoint from before, and on from there
    without the data up to that step (`jmoe.train.roll_backs`); stop: it ends with an
    error, and leaves the newest checkpoint from before. Skipping makes every step 5%
    slower on CPUs; the others cost nothing.

    A checkpoint that any of the three fields `keep_*` keeps stays. It has a validation
    loss if the run was evaluated at its step.

    After each `reassign_every` steps, experts are re-assigned to the devices of the
    mesh's expert axis, in layers whose busiest device has more than a fraction
    `reassign_above` above the mean (`jmoe.train.homes`).
    """

    steps: int
    batch_size: int  # of one optimizer step, once the ramp is over
    microbatch_size: int  # of one forward and backward pass; divides batch_size
    ramp_start: int | None = None  # batch_size at step 0; None: no ramp
    ramp_steps: int = 0  # the batch grows linearly over these
    ramp_increment: int | None = None  # by so much at a time; None: MOST_SIZES at most
    bias_rate: StepwiseConfig = StepwiseConfig(first=1e-3, last=0.0, switch=0.966)
    bias_rate_factors: tuple[LayerRateConfig, ...] = ()  # the last that matches counts
    mtp_weight: StepwiseConfig = StepwiseConfig(first=0.3, last=0.1, switch=0.676)
    loss_chunk: int = 1024  # tokens whose logits exist at one time
    log_every: int = 10
    eval_every: int = 200
    eval_batches: int = 8  # of microbatch_size
    checkpoint_every: int = 200
    checkpoint_minutes: float | None = None  # and so long after the one before
    keep_checkpoints: int = 2  # the newest
    keep_best: int = 1  # those of the lowest validation loss
    keep_every: int | None = None  # those of steps that this divides
    signal_every: int = 10  # at which processes agree whether to stop or save by time
    reassign_every: int = 0  # 0: experts stay where they are
    reassign_above: float = 0.05
    on_nonfinite: str = "stop"
    on_spike: str = "ignore"
    spike_score: float = 8.0  # standard deviations above the median of recent losses
    max_skipped: int = 10  # so many in a row end the run, as "stop" does
    max_roll_backs: int = 3  # to one checkpoint; one more ends the run
    seed: int = 0

    def __post_init__(self):
        checks.one_of(self, on_nonfinite=ON_NONFINITE, on_spike=ON_SPIKE)
        checks.at_least(
            self,
            spike_score=0.0,
            max_skipped=1,
            max_roll_backs=1,
            steps=1,
            batch_size=1,
            microbatch_size=1,
            ramp_steps=0,
            loss_chunk=1,
            log_every=1,
            eval_every=1,
            eval_batches=1,
            checkpoint_every=1,
            keep_checkpoints=1,
            keep_best=0,
            signal_every=1,
            reassign_every=0,
            reassign_above=0.0,
            seed=0,
        )
        checks.at_most(self, steps=2**31 - 1, seed=checks.MAX_SEED)
        if self.checkpoint_minutes is not None:
            checks.at_least(self, checkpoint_minutes=0.0)
        if self.keep_every is not None:
            checks.at_least(self, keep_every=1)
        start = self.batch_size if self.ramp_start is None else self.ramp_start
        for field, size in (("batch_size", self.batch_size), ("ramp_start", start)):
            if size < 1 or size % self.microbatch_size:
                raise ValueError(
                    f"{field}={size} must be a positive multiple of "
                    f"microbatch_size={self.microbatch_size}."
                )
        if start > self.batch_size:
            raise ValueError(
                f"ramp_start={start} must be at most batch_size={self.batch_size}."
            )
        if start < self.batch_size:
            self._check_ramp()

    @property
    def skips_steps(self) -> bool:
        """Whether a step that must not count is made to change nothing."""
        return "skip" in (self.on_nonfinite, self.on_spike)

    @property
    def ramp(self) -> dict[int, int]:
        """Step -> microbatches of the steps from it on, in order; at most MOST_SIZES.

        A batch is the largest of `ramp_start` plus whole increments that isn't above
        the straight line to `batch_size`.
        """
        last = self.batch_size // self.microbatch_size
        if self.ramp_start in (None, self.batch_size):
            return {0: last}
        first = self.ramp_start // self.microbatch_size
        grown = range(0, last - first, self._increment // self.microbatch_size)
        # Where several begin at one step, the largest counts.
        begins = {-(-n * self.ramp_steps // (last - first)): first + n for n in grown}
        return begins | {self.ramp_steps: last}

    @property
    def _increment(self) -> int:
        if self.ramp_increment is not None:
            return self.ramp_increment
        assert self.ramp_start is not None
        grown = (self.batch_size - self.ramp_start) // self.microbatch_size
        return -(-grown // (MOST_SIZES - 1)) * self.microbatch_size

    def _check_ramp(self) -> None:
        start = f"ramp_start={self.ramp_start}"
        if self.ramp_steps < 1:
            raise ValueError(f"ramp_steps=0 must be at least 1 with {start}.")
        increment = self._increment
        if increment < 1 or increment % self.microbatch_size:
            raise ValueError(
                f"ramp_increment={increment} must be a positive multiple of "
                f"microbatch_size={self.microbatch_size}."
            )
        if len(self.ramp) > MOST_SIZES:
            fewest = dataclasses.replace(self, ramp_increment=None)._increment
            raise ValueError(
                f"ramp_increment={increment} makes {len(self.ramp)} sizes of batches "
                f"from {start} to batch_size={self.batch_size}, each a program of its "
                f"own; at most {MOST_SIZES} may be: ramp_increment={fewest}, or none."
            )
