"""A server's families of metrics, as Prometheus reads them.

Counts are since the server's start: rates and shares over time are Prometheus's to
make, as `grafana.json` does. Of loads there is one number a layer and device; those of
every expert, 14,848 in DeepSeek-V3, are the live page's.
"""

from collections.abc import Iterator, Mapping

from prometheus_client import core

from jmoe.monitor import prometheus
from jmoe.monitor.prometheus import array, counter, counters, gauge, histogram
from jmoe.monitor.serving_totals import Totals
from jmoe.monitor.snapshot import Snapshot


def page(
    name: str, totals: Totals, decisions: Mapping[str, int], shown: Snapshot
) -> bytes:
    """Returns the text of a server's metrics.

    Args:
      name: of the model.
      decisions: how many there were, by kind.
      shown: of this moment, for what is measured over a minute.
    """
    families = [
        prometheus.information("jmoe_model", "The model served.", {"model": name}),
        *_work(totals),
        *_requests(totals),
        *_experts(totals, shown),
        counters("jmoe_decisions", "Decisions taken.", "kind", decisions),
    ]
    return prometheus.page(families)


def _work(totals: Totals) -> Iterator[core.Metric]:
    yield counter(
        "jmoe_prompt_tokens", "Tokens of prompts computed.", totals.prompt_tokens
    )
    yield counter("jmoe_new_tokens", "Tokens generated.", totals.new_tokens)
    yield counter("jmoe_drafted_tokens", "Tokens drafted.", totals.drafted)
    yield counter("jmoe_accepted_tokens", "Drafts accepted.", totals.accepted)
    yield counter(
        "jmoe_decoded_sequences", "Sequences decoded, summed over steps.", totals.rows
    )
    yield histogram("jmoe_step_seconds", "Time of an engine's step.", totals.steps)
    yield gauge("jmoe_cache_pages_used", "Cache pages in use.", totals.pages_used)
    yield gauge("jmoe_cache_pages", "Cache pages there are.", totals.pages)


def _requests(totals: Totals) -> Iterator[core.Metric]:
    yield gauge("jmoe_requests_running", "Requests being computed.", totals.running)
    yield gauge("jmoe_requests_waiting", "Requests in the queue.", totals.waiting)
    yield counter("jmoe_requests_admitted", "Requests admitted.", totals.requests)
    yield counters(
        "jmoe_requests_ended", "Requests that ended.", "reason", totals.ended
    )
    yield counter(
        "jmoe_answered_tokens", "Tokens of requests that ended.", totals.answered_tokens
    )
    refused = {str(status): count for status, count in totals.refused.items()}
    yield counters("jmoe_requests_refused", "Requests refused.", "status", refused)
    yield histogram(
        "jmoe_time_to_first_token_seconds",
        "Time from a request's arrival to its first token.",
        totals.first_token,
    )
    yield histogram(
        "jmoe_time_between_tokens_seconds",
        "Time from a token of a request to its next.",
        totals.between_tokens,
    )


def _experts(totals: Totals, shown: Snapshot) -> Iterator[core.Metric]:
    yield array(
        core.CounterMetricFamily,
        "jmoe_expert_choices",
        "Choices of experts computed, by layer and device.",
        ["layer", "device"],
        totals.device_LP,
    )
    yield array(
        core.CounterMetricFamily,
        "jmoe_dropped_choices",
        "Choices of experts that none computed, by layer.",
        ["layer"],
        totals.dropped_L,
    )
    if shown.max_vio_L is not None:
        yield array(
            core.GaugeMetricFamily,
            "jmoe_max_vio",
            "By how much the busiest expert exceeds the mean, over a minute.",
            ["layer"],
            shown.max_vio_L,
        )
    yield counter(
        "jmoe_experts_moved", "Experts moved to other devices.", totals.experts_moved
    )
    yield counter(
        "jmoe_experts_lent", "Experts lent to other devices.", totals.experts_lent
    )
    yield counter(
        "jmoe_fp8_steps", "Steps whose tokens travelled in FP8.", totals.fp8_steps
    )
