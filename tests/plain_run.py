"""A run of fixed numbers for tests of records, whatever becomes of the presets."""

from jmoe.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def plain_run() -> RunConfig:
    return RunConfig(
        name="tiny",
        model=ModelConfig.preset("tiny"),
        data=DataConfig(sequence_length=256),
        train=TrainConfig(steps=600, batch_size=8, microbatch_size=8),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(name="wsd", peak=2e-3, warmup_steps=30)
        ),
    )
