"""The routes of the server, and the responses that follow the scheduler's pieces."""

import asyncio
import hmac
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tinystories_slm.serving.api_error import ApiError
from tinystories_slm.serving.bodies import Body, ChatBody, CompletionBody, RequestBody, parse_body
from tinystories_slm.serving.choice import Choice, Piece
from tinystories_slm.serving.metrics import format_metrics
from tinystories_slm.serving.requests import ServedModel, chat_choices, completion_choices
from tinystories_slm.serving.responses import (
    ChatFormat,
    CompletionFormat,
    JsonResponse,
    merge_pieces,
    server_sent_event,
)
from tinystories_slm.serving.scheduler import Scheduler

logger = logging.getLogger(__name__)

_BODY_TIMEOUT_S = 30
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass
class App:
    """State of the server."""

    served: ServedModel
    scheduler: Scheduler
    api_key: str | None
    """Key that clients must send; None for none."""
    max_body_bytes: int
    on_failure: Callable[[], None] = lambda: None
    """Called after an error in the thread that decodes; the server answers no more requests."""
    has_failed: bool = False

    def build(self) -> Starlette:
        """Return the ASGI application; it starts and ends the thread that decodes."""
        routes = [
            Route("/health", self.health),
            Route("/metrics", self._guard(self.metrics)),
            Route("/v1/models", self._guard(self.models)),
            Route("/v1/models/{name:path}", self._guard(self.model)),
            Route("/v1/completions", self._guard(self.completions), methods=["POST"]),
        ]
        if self.served.tokenizer.chat_template:
            path = "/v1/chat/completions"
            routes.append(Route(path, self._guard(self.chat_completions), methods=["POST"]))
        handlers = {ApiError: _api_error_response, HTTPException: _http_error_response}
        return Starlette(
            routes=routes,
            lifespan=self._decoding_thread,
            exception_handlers={**handlers, Exception: _unexpected_error_response},
        )

    @asynccontextmanager
    async def _decoding_thread(self, _: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._decode, args=(loop,), name="decode", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.scheduler.close()
            await run_in_threadpool(thread.join)

    def _decode(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run the scheduler in a thread; after an error, end every request with it."""
        try:
            self.scheduler.run(lambda pieces: loop.call_soon_threadsafe(_emit_all, pieces))
        except Exception as error:
            logger.exception("the thread that decodes failed; the server is stopping")
            self.has_failed = True
            for choice in self.scheduler.close():
                loop.call_soon_threadsafe(choice.emit, error)
            loop.call_soon_threadsafe(self.on_failure)

    def end_requests(self) -> None:
        """End the requests that are not finished with an error; called in the event loop."""
        for choice in self.scheduler.close():
            choice.emit(ApiError(503, "the server stopped before the text was complete; use another one"))

    def _guard(self, endpoint: Endpoint) -> Endpoint:
        """Return `endpoint` behind a check of the key; the comparison takes the same time for any key."""

        async def guarded(request: Request) -> Response:
            if self.api_key is not None:
                given = request.headers.get("authorization", "").encode("latin-1")
                if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                    raise ApiError(
                        401,
                        "the header Authorization must be `Bearer KEY` with the server's key; set it",
                        code="invalid_api_key",
                    )
            return await endpoint(request)

        return guarded

    async def health(self, request: Request) -> Response:
        if self.has_failed:
            raise ApiError(503, "the thread that decodes failed; start the server again")
        return JsonResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(format_metrics(self.scheduler))

    async def models(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._model_object()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.served.name:
            message = f"model ({name[:60]!r}): is not served; use {self.served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JsonResponse(self._model_object())

    def _model_object(self) -> dict[str, object]:
        return {"id": self.served.name, "object": "model", "created": 0, "owned_by": "tinystories_slm"}

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionBody, completion_choices, CompletionFormat)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, ChatBody, chat_choices, ChatFormat)

    async def _generate(
        self,
        request: Request,
        body_type: type[Body],
        build_choices: Callable[..., list[Choice]],
        format_type: type[CompletionFormat],
    ) -> Response:
        self.scheduler.check_room()
        body = parse_body(await self._read_body(request), body_type)
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        choices = await run_in_threadpool(build_choices, self.served, body, queue.put_nowait)
        self.scheduler.submit(choices)
        formatted = format_type(self.served.name, self.served.tokenizer)
        if body.stream:
            return _ChoiceStream(choices, _stream_events(formatted, body, choices, queue))
        try:
            pieces = await _collect_or_disconnect(request, choices, queue)
        finally:
            _cancel(choices)
        return JsonResponse(formatted.response(pieces, choices))

    async def _read_body(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            ApiError: it is too large, too slow, or not declared as JSON.
        """
        # A page of another site can send a form or plain text to a server on loopback, but no JSON.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the header Content-Type must be application/json; set it")
        content = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                async for part in request.stream():
                    content += part
                    if len(content) > self.max_body_bytes:
                        raise ApiError(
                            413, f"the body must have at most {self.max_body_bytes} bytes; shorten it"
                        )
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not arrive within {_BODY_TIMEOUT_S} s; send it again"
            ) from error
        except ClientDisconnect as error:
            raise ApiError(400, "the client disconnected; send the request again") from error
        return bytes(content)


def _emit_all(pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        piece.choice.emit(piece)


def _cancel(choices: Sequence[Choice]) -> None:
    """Mark choices for the scheduler, which frees the slots of unfinished ones at the next token boundary."""
    for choice in choices:
        choice.is_cancelled = True


async def _read_pieces(
    choices: Sequence[Choice], queue: asyncio.Queue[Piece | Exception]
) -> AsyncIterator[list[Piece]]:
    """Yield the pieces that have arrived, until all choices are finished.

    A client that reads slowly gets more pieces at a time; the batch does not wait for it.

    Raises:
        ApiError: the thread that decodes failed, or the server stopped.
    """
    num_unfinished = len(choices)
    while num_unfinished:
        arrived = [await queue.get()]
        while not queue.empty():
            arrived.append(queue.get_nowait())
        for piece in arrived:
            if isinstance(piece, ApiError):
                raise piece
            if isinstance(piece, Exception):
                raise ApiError(500, "the server failed while it generated the text; try again later")
        num_unfinished -= sum(piece.finish_reason is not None for piece in arrived)
        yield arrived


async def _collect(choices: Sequence[Choice], queue: asyncio.Queue[Piece | Exception]) -> list[Piece]:
    return [piece async for pieces in _read_pieces(choices, queue) for piece in pieces]


async def _collect_or_disconnect(
    request: Request, choices: Sequence[Choice], queue: asyncio.Queue[Piece | Exception]
) -> list[Piece]:
    """Return the pieces; an empty list as soon as the client disconnects."""
    collecting = asyncio.create_task(_collect(choices, queue))
    disconnected = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({collecting, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else []
    finally:
        collecting.cancel()
        disconnected.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream_events(
    formatted: CompletionFormat,
    body: RequestBody,
    choices: Sequence[Choice],
    queue: asyncio.Queue[Piece | Exception],
) -> AsyncIterator[bytes]:
    """Yield the events of a streamed response."""
    for chunk in formatted.first_chunks(choices):
        yield server_sent_event(chunk)
    try:
        async for pieces in _read_pieces(choices, queue):
            events = [
                server_sent_event(formatted.chunk(piece))
                for piece in merge_pieces(pieces)
                if piece.text or piece.tokens or piece.finish_reason
            ]
            if events:
                yield b"".join(events)
    except ApiError as error:
        yield server_sent_event(error.body())
        return
    if body.includes_usage:
        yield server_sent_event(formatted.usage_chunk(choices))
    yield server_sent_event("[DONE]")


class _ChoiceStream(StreamingResponse):
    """A streamed response that cancels its choices when it ends, in whichever way."""

    def __init__(self, choices: Sequence[Choice], events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._choices)


async def _api_error_response(request: Request, error: ApiError) -> Response:
    return JsonResponse(error.body(), status_code=error.status, headers=error.headers)


async def _http_error_response(request: Request, error: HTTPException) -> Response:
    """Return the error of a path or method that does not exist."""
    message = f"{request.method} {request.url.path[:60]}: {error.detail.lower()}; see docs/serving.md"
    return await _api_error_response(request, ApiError(error.status_code, message, headers=error.headers))


async def _unexpected_error_response(request: Request, error: Exception) -> Response:
    """Return an error without details; Starlette logs them."""
    return await _api_error_response(request, ApiError(500, "the server failed; try again later"))
