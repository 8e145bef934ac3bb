"""A server as its clients see it; it needs vLLM and Ray (`pytest -m serving`)."""

import concurrent.futures
import http.client
import os
import signal

import pytest

from jmoe.decode.generate import generate
from jmoe.monitor import vllm
from tests.serve.client import NAME, PROMPTS, events, greedy

pytestmark = pytest.mark.serving
NEW = 60
CHAT = [{"role": "user", "content": "The square of 7"}]
CHAT_AS_TEXT = "user: The square of 7\nassistant:"  # by the exported template


@pytest.fixture(scope="module")
def server(start):
    with start() as server:
        yield server


@pytest.fixture(scope="module")
def expected(trained) -> list[list[int]]:
    return generate(trained.run.model, trained.variables, PROMPTS, max_new_tokens=NEW)


def test_greedy_tokens_are_our_own_and_those_of_transformers(
    server, directory, expected
):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    for prompt, ours in zip(PROMPTS, expected, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            temperature=None,
            top_p=None,
        )
        assert theirs[0, len(prompt) :].tolist() == ours
        assert server.complete(prompt, NEW) == ours


def test_32_requests_at_once_are_each_answered_as_if_alone(server, trained):
    texts = [f"The square of {i}" for i in range(32)]
    prompts = [trained.tokenizer.encode(text) for text in texts]
    alone = [server.complete(prompt, NEW) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        at_once = list(pool.map(lambda prompt: server.complete(prompt, NEW), prompts))
    assert at_once == alone
    assert len(set(map(tuple, alone))) > 8  # the answers do differ


def test_a_streamed_completion_is_the_whole_one_in_pieces(server, expected):
    body = greedy(PROMPTS[1], NEW, stream=True)
    with server.open("/v1/completions", body) as response:
        *pieces, done = events(response)
    assert done == "[DONE]" and len(pieces) > 10
    tokens = [t for piece in pieces for t in piece["choices"][0]["token_ids"]]
    assert tokens == expected[1]


def test_a_chat_is_a_completion_of_its_template_whole_or_streamed(server, trained):
    said = greedy(None, 20) | {"messages": CHAT}
    del said["prompt"]
    whole = server.ask("/v1/chat/completions", said).json
    prompt, answer = whole["prompt_token_ids"], whole["choices"][0]
    assert trained.tokenizer.decode(prompt).endswith(CHAT_AS_TEXT)
    assert answer["token_ids"] == server.complete(prompt, 20)
    with server.open("/v1/chat/completions", said | {"stream": True}) as response:
        *pieces, done = events(response)
    assert done == "[DONE]" and len(pieces) > 10
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == answer["message"]["content"] != ""


def test_models_health_and_metrics_are_there(server):
    (model,) = server.ask("/v1/models").json["data"]
    assert (model["id"], model["max_model_len"]) == (NAME, 1024)
    assert server.ask("/health").status == 200
    server.complete(PROMPTS[0], 5)
    (generated,) = server.measured("vllm:generation_tokens_total").values()
    assert generated >= 5


def test_the_live_page_reads_what_vllm_measures(server):
    server.complete(PROMPTS[0], 5)
    reading = vllm.read(server.ask("/metrics").text, 0.0)
    assert reading.model == NAME and reading.cache is not None
    assert reading.counts["new"] >= 5 and reading.counts["prompt"] >= len(PROMPTS[0])
    assert reading.counts["ended"] >= 1 and reading.gauges["running"] == 0
    assert reading.durations["first_token"].count_B.sum() >= 1
    assert reading.durations["between_tokens"].count_B.sum() >= 4


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"model": ', 400, "JSON decode error"),
        ({"model": NAME, "prompt": 5.5}, 400, "body.prompt"),
        (greedy("x", 5) | {"model": "other"}, 404, "`other` does not exist"),
        (greedy("x", 5000), 400, "cannot be greater than max_model_len=1024"),
        (greedy("x", -1), 400, "max_tokens=-1 must be at least 0"),
        (greedy("x", 5, n=16384), 400, "n=16384 must be at most 16 (limits.choices)"),
        (greedy("x", 5, logprobs=21), 400, "logprobs=21 must be at most 20"),
        (greedy(["x"] * 65, 5), 400, "at most 64 may be asked for at once"),
        (b" " * (2**21 + 1), 413, "more than 2048 KiB"),
        (greedy("x", 5, temperature=-1), 400, "temperature must be non-negative"),
        (greedy([0, 300], 5), 400, "out of vocabulary"),
        (greedy([0] * 1025, 1), 400, "1024"),
    ],
)
def test_a_malformed_request_gets_a_4xx_with_the_reason(server, body, status, reason):
    response = server.ask("/v1/completions", body)
    assert (response.status, reason in response.text) == (status, True), response


@pytest.mark.parametrize("path", ["/scale_elastic_ep", "/docs", "/-/routes"])
def test_what_vllm_and_ray_serve_besides_is_not_reached(server, path):
    for body in (None, {}):
        assert server.ask(path, body).status == 404


def test_a_killed_replica_is_replaced_and_its_requests_end(server, expected):
    """Requests in flight fail at once; those that come meanwhile wait for its heir."""
    before = set(server.measured("vllm:generation_tokens_total"))
    long = greedy(PROMPTS[2], 1000)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = server.open("/v1/completions", long | {"stream": True})
        assert stream.readline().startswith(b"data: ")
        whole = pool.submit(server.ask, "/v1/completions", long)
        server.wait_for(lambda: sum(server.measured(RUNNING).values()) == 2)
        os.kill(replica_process(server).pid, signal.SIGKILL)
        assert whole.result(timeout=30).status == 500
        with pytest.raises(http.client.IncompleteRead):
            stream.read()
    assert server.complete(PROMPTS[1], NEW) == expected[1]
    assert set(server.measured("vllm:generation_tokens_total")).isdisjoint(before)


RUNNING = "vllm:num_requests_running"


def replica_process(server):
    import psutil

    (found,) = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "ServeReplica" in " ".join(process.cmdline())
    ]
    return found
