"""What a run reads: its text sources, their mixture, tokenizer and packing."""

import dataclasses
import math

from jmoe.config import checks

BUILTIN_DOMAINS = ("code", "prose", "arithmetic")
BUILTIN_PATHS = ("builtin", *(f"builtin:{domain}" for domain in BUILTIN_DOMAINS))
ON_CORRUPT = ("refuse", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One text source and its share of the mixture.

    `path` is "builtin" (the embedded corpus), "builtin:code", "builtin:prose" or
    "builtin:arithmetic" (one of its domains), or a file or glob of .txt, .txt.gz,
    .jsonl, .jsonl.gz, .parquet or .arrayrecord files.
    """

    path: str = "builtin"
    weight: float = 1.0  # share of the tokens, relative to the other sources
    text_field: str = "text"  # field or column that holds a document's text

    def __post_init__(self):
        if not self.path or not self.text_field:
            raise ValueError(
                f"path={self.path!r} and text_field={self.text_field!r} "
                "must not be empty."
            )
        if self.path.startswith("builtin:"):
            checks.one_of(self, path=BUILTIN_PATHS)
        if not 0 < self.weight < math.inf:
            raise ValueError(
                f"weight={self.weight!r} of {self.path!r} must be a positive number."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A mixture of sources, tokenised and packed into rows of one length."""

    sources: tuple[SourceConfig, ...] = (
        SourceConfig(path="builtin:code", weight=0.5),
        SourceConfig(path="builtin:prose", weight=0.3),
        SourceConfig(path="builtin:arithmetic", weight=0.2),
    )
    tokenizer: str = "builtin"  # a BPE trained on the sources, or a tokenizer.json
    sequence_length: int = 256  # tokens predicted in a row
    segment_masks: bool = False  # attention stays in a document (DeepSeek-V3: no)
    validation_fraction: float = 0.05  # of each source's documents
    seed: int = 0  # of the shuffling
    on_corrupt: str = "refuse"  # or "skip": a record that can't be read is left out
    cache_dir: str = ""  # "" is $XDG_CACHE_HOME/jmoe or ~/.cache/jmoe

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources=() must hold at least one source.")
        if not self.tokenizer:
            raise ValueError("tokenizer='' must be 'builtin' or a tokenizer.json.")
        checks.one_of(self, on_corrupt=ON_CORRUPT)
        checks.at_least(self, sequence_length=1, seed=0)
        checks.at_most(self, seed=checks.MAX_SEED)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction!r} must lie "
                "between 0 and 1."
            )
