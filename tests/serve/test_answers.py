"""Refusals have the shape and the types of OpenAI's errors."""

import json

import pytest

from jmoe.serve import answers
from jmoe.serve.answers import Refused
from jmoe.serve.worker import FAILED, LATE, SLOW, STOPPED


@pytest.mark.parametrize(
    ("refused", "kind"),
    [
        (Refused(400, "No."), "invalid_request_error"),
        (Refused(401, "No."), "invalid_request_error"),
        (Refused(408, "No."), "invalid_request_error"),
        (Refused(429, "No."), "rate_limit_error"),
        (Refused(500, "No."), "server_error"),
        (FAILED, "service_unavailable_error"),
        (STOPPED, "service_unavailable_error"),
        (SLOW, "service_unavailable_error"),
        (LATE, "server_error"),
    ],
)
def test_a_refusal_has_the_type_that_openai_has_for_its_status(refused, kind):
    start, told = answers.start_and_body(refused)
    error = json.loads(told["body"])["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, refused.status)
    assert error["message"] == refused.message and start["status"] == refused.status


def test_a_refusal_names_its_field_and_has_its_headers():
    full = Refused(429, "Later.", "n", headers=(("retry-after", "3"),))
    start, told = answers.start_and_body(full)
    assert json.loads(told["body"])["error"]["param"] == "n"
    length = str(len(told["body"])).encode()
    assert dict(start["headers"]) == {
        b"content-type": b"application/json",
        b"content-length": length,
        b"retry-after": b"3",
    }
