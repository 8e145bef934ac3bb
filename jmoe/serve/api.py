"""The HTTP application of our engine: OpenAI's API over one `Worker`.

It is plain ASGI behind Starlette's routes, for uvicorn as for a replica of Ray Serve's.
Whoever serves it puts `jmoe.serve.front` before it, which bounds what comes here.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from jmoe.monitor import web
from jmoe.serve import answers
from jmoe.serve.answering import Answering, ChatForm, Served, TextForm, event
from jmoe.serve.answers import Refused
from jmoe.serve.front import PAGE
from jmoe.serve.openai_answers import ServedModel, ServedModels
from jmoe.serve.worker import FAILED, Ticket

T = TypeVar("T")

LARGE = 2**14  # bytes of a body that is read in a thread, beside others' answers
JSON = "application/json"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
DONE = event(b"[DONE]")


def make_app(served: Served) -> Starlette:
    """Returns the application, an ASGI app."""

    async def health(_: Request) -> Response:
        if served.worker.is_well:
            return Response(b"{}", media_type=JSON)
        return _response(FAILED)

    async def models(_: Request) -> Response:
        model = ServedModel(
            id=served.name,
            object="model",
            created=served.created,
            owned_by="jmoe",
            max_model_len=served.max_length,
        )
        found = ServedModels(object="list", data=[model])
        return Response(found.to_json(), media_type=JSON)

    async def metrics(_: Request) -> Response:
        text = await asyncio.to_thread(served.meter.prometheus)
        return Response(text, headers={"content-type": web.PROMETHEUS_TYPE})

    live = web.make_app(served.meter.snapshot, served.meter.prometheus)
    texts = CompletionEndpoint(served, TextForm)
    chats = CompletionEndpoint(served, ChatForm)
    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/completions", texts, methods=["POST"]),
        Route("/v1/chat/completions", chats, methods=["POST"]),
        Mount(PAGE, live),
    ]
    handlers = {HTTPException: _answer_other, Exception: _answer_failure}
    return Starlette(routes=routes, exception_handlers=handlers)


class ClientGone(Exception):
    """The client has closed its connection."""


class CompletionEndpoint:
    """An ASGI app that answers one kind of requests."""

    def __init__(self, served: Served, form: type[TextForm] | type[ChatForm]):
        self._served, self._form = served, form

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            body = await Request(scope, receive).body()
            answering = await self._prepare(body)
            asked = answering.asked
            ticket = self._served.worker.submit(
                answering.requests, answering.seconds, bool(asked.stream)
            )
            answer = _stream if asked.stream else _whole
            with ticket:
                await _attended(answer(answering, ticket, send), receive)
        except (ClientGone, ClientDisconnect):
            pass
        except Refused as refused:
            await self._refuse(refused, send)
        except ValueError as error:
            await self._refuse(Refused(400, str(error)), send)

    async def _refuse(self, refused: Refused, send: Any) -> None:
        self._served.meter.refused(refused.status)
        await answers.answer(refused, send)

    async def _prepare(self, body: bytes) -> Answering:
        arguments = self._served, self._form, body
        if len(body) < LARGE:
            return Answering(*arguments)
        return await asyncio.to_thread(Answering, *arguments)


async def _whole(answering: Answering, ticket: Ticket, send: Any) -> None:
    increments = [one async for some in ticket for one in some]
    body = answering.whole(increments).to_json()
    length = str(len(body)).encode()
    headers = [(b"content-type", JSON.encode()), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(answering: Answering, ticket: Ticket, send: Any) -> None:
    """Sends tokens as they come; what ends it before its first one has a status."""
    has_begun = False

    async def send_body(body: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})

    try:
        async for increments in ticket:
            events = answering.chunk(increments)
            if not has_begun:
                has_begun = True
                start = {"type": "http.response.start", "status": 200}
                await send(start | {"headers": STREAM_HEADERS})
                events = answering.beginning() + events
            if events:
                await send_body(events)
        await send_body(answering.ending() + DONE, more=False)
    except Refused as refused:
        if not has_begun:
            raise
        _, told = answers.start_and_body(refused)
        await send_body(event(told["body"]) + DONE, more=False)


async def _attended(work: Awaitable[T], receive: Any) -> T:
    """Returns what `work` does, which ends if the client leaves.

    Raises:
      ClientGone: it has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(receive))
    try:
        both = {working, leaving}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer_other(_: Request, error: Exception) -> Response:
    """Answers a request that no route is for."""
    assert isinstance(error, HTTPException)
    headers = tuple((error.headers or {}).items())
    return _response(Refused(error.status_code, f"{error.detail}.", headers=headers))


async def _answer_failure(_: Request, error: Exception) -> Response:
    return _response(Refused(500, "The server has made a mistake; its log says which."))


def _response(refused: Refused) -> Response:
    start, body = answers.start_and_body(refused)
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return Response(body["body"], refused.status, headers)
