"""A server with OpenAI's API, asked over HTTP: what comes of each way it can answer."""

import collections
import contextlib
import http.server
import json
import socket
import threading
import time

import pytest

from jmoe.decode.requests import Sampling
from jmoe.evals import math500
from jmoe.evals.completions import Prompted, Reply
from jmoe.evals.endpoint import Endpoint, EndpointConfig
from tests.evals.conftest import PROBLEMS

GREEDY = Sampling(max_new_tokens=7)
PROMPTS = [Prompted(f"prompt {number}", GREEDY) for number in range(12)]
MODELS = {"data": [{"id": "only"}]}


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # a connection that finds it full comes back in a second


def chat(text, **more):
    return {
        "choices": [{"message": {"content": text}, "finish_reason": "stop", **more}]
    }


@pytest.fixture
def serving():
    """Serves `respond(path, body, headers) -> (status, headers, content)`."""
    with contextlib.ExitStack() as stack:

        def serve(respond):
            class Handler(http.server.BaseHTTPRequestHandler):
                def answer(self):
                    length = int(self.headers.get("Content-Length", 0))
                    body = json.loads(self.rfile.read(length) or "null")
                    status, headers, content = respond(self.path, body, self.headers)
                    if not isinstance(content, bytes):
                        content = json.dumps(content).encode()
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

                do_GET = do_POST = answer

                def log_message(self, *_):
                    pass

            server = Server(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=server.serve_forever, args=[0.01])
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/v1"

        yield serve


def config(url, **options):
    return EndpointConfig(endpoint=url, **{"model": "m", "wait": 0.01} | options)


def ask(url, prompts=PROMPTS, **options):
    replies = list(Endpoint(config(url, **options)).complete(prompts))
    return sorted(replies)


def echo(path, body, headers):
    prompt = body["messages"][0]["content"]
    time.sleep(0.01 * (int(prompt.split()[-1]) % 3))
    return 200, {}, chat(prompt.upper())


def test_replies_belong_to_their_prompts_in_whatever_order_they_come(serving):
    assert ask(serving(echo)) == [
        Reply(number, f"PROMPT {number}", "stop") for number in range(12)
    ]


def test_a_request_says_what_is_to_be_decoded_and_how(serving):
    seen = []

    def respond(path, body, headers):
        seen.append((path, body, headers["Authorization"]))
        return 200, {}, {"choices": [{"text": "so", "finish_reason": "length"}]}

    sampling = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=5, seed=3)
    url = serving(respond)
    server = Endpoint(config(url + "/", api="completions"), key="secret")
    assert list(server.complete([Prompted("text", sampling)])) == [
        Reply(0, "so", "length")
    ]
    settings = {"temperature": 0.6, "top_p": 0.9, "max_tokens": 5, "seed": 3}
    body = {"model": "m", "prompt": "text", **settings}
    assert seen == [("/v1/completions", body, "Bearer secret")]


def test_so_many_requests_are_open_at_a_time_and_no_more(serving):
    open_now, most, lock = 0, 0, threading.Lock()
    three = threading.Barrier(3)

    def respond(path, body, headers):
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        three.wait(60)
        time.sleep(0.05)  # in which others would come, if they could
        with lock:
            open_now -= 1
        return 200, {}, chat("")

    ask(serving(respond), concurrency=3)
    assert most == 3


def test_what_passes_is_tried_again(serving):
    failures = collections.Counter()
    ways = [
        (500, b"oops"),
        (503, {"error": "busy"}),
        (429, {"error": {"message": "x"}}),
    ]

    def respond(path, body, headers):
        prompt = body["messages"][0]["content"]
        failures[prompt] += 1
        if failures[prompt] <= len(ways):
            status, content = ways[failures[prompt] - 1]
            return status, {"Retry-After": "0"}, content
        return echo(path, body, headers)

    assert [reply.text for reply in ask(serving(respond))] == [
        prompt.text.upper() for prompt in PROMPTS
    ]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_an_error_and_the_others_go_on(serving, status):
    def respond(path, body, headers):
        if body["messages"][0]["content"] == "prompt 3":
            return status, {}, {"error": {"message": "too\nlong"}}
        return echo(path, body, headers)

    replies = ask(serving(respond))
    assert replies[3] == Reply(3, "", "error", f"status {status}: too long")
    assert [reply.error for reply in replies if reply.number != 3] == [""] * 11


@pytest.mark.parametrize(
    ("status", "content", "kind", "complaint"),
    [
        (
            500,
            b"<h1>oops</h1>",
            ConnectionError,
            "status 500: <h1>oops</h1>, at the la",
        ),
        (502, b"", ConnectionError, "status 502: Bad Gateway, at the last of 2 tries"),
        (
            401,
            {"error": {"message": "no"}},
            ValueError,
            r"401: no \(.*OPENAI_API_KEY\)",
        ),
        (404, {"error": "no model"}, ValueError, "answered with status 404: no model"),
        (302, b"", ValueError, "answered with status 302"),
        (200, b"garbage", ValueError, "answered with no JSON: b'garbage'"),
        (200, b"", ValueError, "answered with no JSON"),
        (200, [], ValueError, "answered with no completion: "),
        (200, {"choices": []}, ValueError, "no completion: {.choices.: ..}"),
        (200, chat(["x"]), ValueError, "answered with no completion"),
    ],
)
def test_what_is_no_completion_ends_it_in_plain_words(
    serving, status, content, kind, complaint
):
    headers = {"Location": "http://127.0.0.1:9/"} if status == 302 else {}
    url = serving(lambda *_: (status, headers, content))
    with pytest.raises(kind, match=complaint) as raised:
        ask(url, tries=2)
    assert f"endpoint={url!r}" in str(raised.value) and "\n" not in str(raised.value)


def test_a_server_that_is_down_is_told_after_the_last_try():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(ConnectionError, match="refused, at the last of 3 tries"):
        ask(url, tries=3)


def test_a_server_that_says_nothing_is_not_waited_for_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match="timed out, at the last of 1 tries"):
            ask(url, PROMPTS[:1], tries=1, seconds=0.2)


def test_a_server_with_one_model_need_not_be_told_its_name(serving):
    url = serving(lambda path, *_: (200, {}, MODELS if "models" in path else chat("a")))
    assert Endpoint(config(url, model="")).model == "only"


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, "has the models a, b; name one"),
        ({"data": []}, "has the models none"),
        ({"object": "list"}, "answered with no list of models"),
    ],
)
def test_otherwise_a_model_has_to_be_named(serving, models, complaint):
    url = serving(lambda *_: (200, {}, models))
    with pytest.raises(ValueError, match=complaint):
        Endpoint(config(url, model=""))


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://h/v1", "http://", "http://h:x", "http://h:0",
            "http://[", "http://a b/", "http://\nh", "http://hä/v1", "http://h/?a=b"]
)  # fmt: skip
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match="must be a URL such as"):
        EndpointConfig(endpoint=url)


def test_math500_scores_a_server_as_it_does_a_model(serving, problems_file, judge):
    solutions = {math500.message(p["problem"]): p["solution"] for p in PROBLEMS}

    def respond(path, body, headers):
        return 200, {}, chat(solutions[body["messages"][0]["content"]])

    problems = math500.read_problems(problems_file)
    asked = math500.plan(problems, GREEDY, prompt=math500.message)
    complete = Endpoint(config(serving(respond))).complete
    score = math500.score(math500.evaluate(asked, complete, judge))
    assert score.total.accuracy == 1.0
