"""The record of serving: what it refuses by itself."""

import pytest

from jmoe.config import override
from jmoe.config.serve import ServeConfig


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["port=0"], "port=0 must be at least 1."),
        (["port=65536"], "port=65536 must be at most 65535."),
        (["min_replicas=0"], "min_replicas=0 must be at least 1."),
        (["min_replicas=3"], "max_replicas=1 must be at least 3."),
        (["requests_per_replica=0"], "requests_per_replica=0 must be at least 1."),
        (["drain_seconds=-1"], "drain_seconds=-1.0 must be at least 0.0."),
        (
            ["open_routes=['/v1/models']"],
            "open_routes has '/v1/models', which is not one of '/health', '/metrics', "
            "'/monitor'.",
        ),
        (
            ["tls_key=key.pem"],
            "tls_certificate=None and tls_key='key.pem' must be given together.",
        ),
        (["limits.connections=0"], "connections=0 must be at least 1."),
        (["limits.header_kib=0"], "header_kib=0 must be at least 1."),
        (["limits.header_seconds=0"], "header_seconds=0.0 must be above 0."),
        (["limits.body_kib=0"], "body_kib=0 must be at least 1."),
        (["limits.body_seconds=inf"], "body_seconds=inf must be finite."),
        (["limits.stall_seconds=-1"], "stall_seconds=-1.0 must be above 0."),
        (["limits.prompts=0"], "prompts=0 must be at least 1."),
        (["limits.choices=0"], "choices=0 must be at least 1."),
        (["limits.new_tokens=0"], "new_tokens=0 must be at least 1."),
        (["limits.logprobs=-1"], "logprobs=-1 must be at least 0."),
        (["limits.items=0"], "items=0 must be at least 1."),
        (["engine.tensor_parallel=0"], "tensor_parallel=0 must be at least 1."),
        (["engine.pipeline_parallel=0"], "pipeline_parallel=0 must be at least 1."),
        (["engine.draft_tokens=-1"], "draft_tokens=-1 must be at least 0."),
        (["engine.max_sequences=0"], "max_sequences=0 must be at least 1."),
        (["engine.max_length=1"], "max_length=1 must be at least 2."),
        (["engine.prompt_tokens=0"], "prompt_tokens=0 must be at least 1."),
        (["engine.cache_gib=0"], "cache_gib=0.0 must be above 0."),
        (
            ["engine.dtype=float16"],
            "dtype='float16' is not one of None, 'float32', 'bfloat16'.",
        ),
        (["engine.placement={}"], "placement needs expert_parallel=True."),
        (
            ["engine.expert_parallel=True", "engine.placement={'window_steps': 0}"],
            "window_steps=0 must be at least 1.",
        ),
        (
            ["engine.expert_parallel=True", "engine.placement={'interval_steps': 0}"],
            "interval_steps=0 must be at least 1.",
        ),
        (
            [
                "engine.expert_parallel=True",
                "engine.placement={'redundant_experts': -1}",
            ],
            "redundant_experts=-1 must be at least 0.",
        ),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(assignments, said):
    with pytest.raises(ValueError) as error:
        override(ServeConfig(), assignments)
    assert str(error.value) == said


def test_an_engine_has_a_device_for_each_share_of_each_group_of_layers():
    sizes = ["engine.tensor_parallel=8", "engine.pipeline_parallel=2"]
    assert override(ServeConfig(), sizes).engine.num_devices == 16
