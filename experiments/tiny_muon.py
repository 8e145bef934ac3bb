"""Does Muon learn faster than AdamW at the size of the tiny run?

    python scripts/train.py --experiment=experiments/tiny_muon.py

trains as `python scripts/train.py` does, with Muon on the hidden matrices. Embedding,
head, router and norms stay with AdamW, at the same learning rate.

Hardware: 2 CPU cores, about 4 minutes.
Expected: a lower loss than AdamW's after as many steps, each a little slower.
Observed after 100 steps (--set train.steps=100): validation loss 5.174, global MaxVio
0.792; with AdamW (--set optimizer.name=adamw) 5.297 and 1.199.
"""

import dataclasses

from jmoe.config import RunConfig, presets


def get_config() -> RunConfig:
    run = presets.tiny_run()
    optimizer = dataclasses.replace(run.optimizer, name="muon")
    return dataclasses.replace(run, name="tiny_muon", optimizer=optimizer)
