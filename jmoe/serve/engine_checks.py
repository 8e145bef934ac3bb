"""What both engines refuse, as neither could do it: vLLM's and ours."""

from jmoe.config import ModelConfig
from jmoe.config.serve import EngineConfig


def check(model: ModelConfig, cfg: EngineConfig) -> None:
    """Refuses devices, drafts and lengths that the model or the record has no way for.

    Raises:
      ValueError: names the field.
    """
    if cfg.expert_parallel and cfg.tensor_parallel == 1:
        raise ValueError(
            "engine.expert_parallel=True needs engine.tensor_parallel above 1: experts "
            "are spread over the devices that share a layer."
        )
    if cfg.draft_tokens and not model.mtp_depth:
        raise ValueError(
            f"engine.draft_tokens={cfg.draft_tokens} needs a model with MTP modules; "
            "this one has mtp_depth=0."
        )
    if cfg.max_length is not None and cfg.max_length > model.max_positions:
        raise ValueError(
            f"engine.max_length={cfg.max_length} must be at most the model's "
            f"max_positions={model.max_positions}."
        )
