"""The smallest run that has every part of a large one: seconds, once it is compiled.

python scripts/train.py --experiment=tests/smallest_run.py

Its batches grow from one microbatch to two, so that both ways to take a step occur.
"""

from jmoe.config import (
    DataConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RouterConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def get_config() -> RunConfig:
    model = ModelConfig(
        vocab_size=300,
        hidden_dim=32,
        num_layers=2,
        num_dense_layers=1,
        dense_mlp_dim=48,
        max_positions=64,
        mtp_depth=1,
        init_std=0.02,
        attention=MLAConfig(
            num_heads=2,
            query_latent_dim=16,
            kv_latent_dim=16,
            nope_dim=8,
            rope_dim=8,
            value_dim=8,
        ),
        moe=MoEConfig(
            expert_mlp_dim=16,
            router=RouterConfig(
                num_experts=8, top_k=2, num_groups=4, groups_per_token=2
            ),
        ),
    )
    return RunConfig(
        name="smallest",
        model=model,
        data=DataConfig(sequence_length=32, validation_fraction=0.2),
        train=TrainConfig(
            steps=40,
            batch_size=8,
            microbatch_size=4,
            ramp_start=4,
            ramp_steps=6,
            log_every=1,
            eval_every=20,
            eval_batches=2,
            checkpoint_every=20,
        ),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(name="wsd", peak=1e-2, warmup_steps=2)
        ),
    )
