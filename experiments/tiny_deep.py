"""What do drafts gain, on a model that is trained and as deep as drafts need?

    python scripts/train.py --experiment=experiments/tiny_deep.py

A draft costs a block and a head, beside all of a model's blocks: 1 to 61 in V3, 1 to 4
in the tiny model. This one has the tiny model's width and 12 blocks.
`scripts/bench.py --suite=decode_cpu` trains it, if it isn't there, and decodes with it.

Hardware: 2 CPU cores, about 12 minutes.
"""

import dataclasses

from jmoe.config import RunConfig, override, presets


def get_config() -> RunConfig:
    run = override(
        presets.tiny_run(),
        [
            "model.num_layers=12",
            "model.moe.router.num_experts=16",
            "model.moe.router.top_k=2",
            "train.steps=840",
            "train.mtp_weight.last=0.3",
            "train.eval_every=420",
            "train.checkpoint_every=420",
        ],
    )
    return dataclasses.replace(run, name="tiny_deep")
