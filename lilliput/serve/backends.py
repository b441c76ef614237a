"""The model servers behind the gateway, on the device and on the edge server, both with OpenAI's chat API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from typing import Any

import yarl

from lilliput.chat.control_tokens import ControlTokens
from lilliput.llama_server.completions import Chunks, normalize_chunks, normalize_completion
from lilliput.serve.circuit_breaker import Breaker
from lilliput.serve.transport import HttpTransport, NetworkError, ReadTimeout, Response, Transport

COUNT_TIMEOUT_S = 5.0
# A conversation whose texts a chat template with functions puts into the prompt: description, call and result.
_PROBE_MARKS = ("lilliput-description", "lilliput-argument", "lilliput-result")
_PROBE = {
    "messages": [
        {"role": "user", "content": "lilliput-question"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "lilliput1",
                    "type": "function",
                    "function": {"name": "probe", "arguments": json.dumps({"text": _PROBE_MARKS[1]})},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "lilliput1", "content": _PROBE_MARKS[2]},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "probe",
                "description": _PROBE_MARKS[0],
                "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
            },
        }
    ],
}
MOST_BYTES = 4 * 2**20  # largest answer; a longer one is a failure


class HTTPStatusError(Exception):
    """A backend responded with an error status; the message is the backend's.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# Unreachable, error status, timeout, invalid JSON, or JSON that is not a chat completion.
_FAILURES = (
    NetworkError,
    ReadTimeout,
    HTTPStatusError,
    TimeoutError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,  # a count of 1e999 tokens
    RecursionError,  # a thousand nested brackets
)
_FIRST_ERROR, _INVALID_REQUEST, _TEMPLATE_FAILS = 400, (400, 413, 422), (400, 500)  # HTTP statuses


class BackendFailed(Exception):
    """A backend gave no usable answer. The message completes a sentence: "the edge server failed (…)"."""


class BackendDown(BackendFailed):
    """The process of a backend is not running."""


class BackendRejected(Exception):
    """The request is invalid for a backend's model. The client has to change it.

    Attributes:
        param: the invalid field, if known.
    """

    def __init__(self, message: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Backend:
    """Client of an OpenAI-compatible server.

    Args:
        url: its address, without `/v1`.
        timeout_s: time limit of an answer. For a stream, the limit of the first chunk, and again of all the rest: once
            a stream has begun, no other backend can answer.
        model: the model name to send, for a server with several models.
        key: the API key.
        breaker: pauses requests to a failing backend; None to try each time.
        transport: sends the requests; HTTP if None.
        clock: returns the CPU-seconds that its process has used; None where they are unknown.
        running: whether its process is running; always true where that is unknown.
        control_tokens: control tokens of its model, which are split in users' text; None where they are unknown.
        llama_cpp: whether it is llama.cpp's server, which returns function calls as text and ignores `tool_choice`.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        *,
        model: str | None = None,
        key: str | None = None,
        breaker: Breaker | None = None,
        transport: Transport | None = None,
        clock: Callable[[], float | None] | None = None,
        running: Callable[[], bool] = lambda: True,
        control_tokens: ControlTokens | None = None,
        llama_cpp: bool = False,
    ) -> None:
        self.model, self.breaker, self.clock, self.llama_cpp = model, breaker, clock, llama_cpp
        self._renders_functions: bool | None = None
        self._running, self.control_tokens = running, control_tokens
        self.timeout_s = timeout_s
        self._chat, self._count, self._template, self._health = (
            yarl.URL(url.rstrip("/") + path)
            for path in ("/v1/chat/completions", "/v1/chat/completions/input_tokens", "/apply-template", "/health")
        )
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._transport = transport or HttpTransport()

    async def close(self) -> None:
        """Closes its connections."""
        await self._transport.close()

    async def healthy(self) -> bool:
        """Whether the server responds to a health check."""
        try:
            async with self._send("GET", self._health, 5.0) as response:
                return response.status == 200
        except (NetworkError, ReadTimeout):
            return False

    @property
    def up(self) -> bool:
        """Whether the circuit breaker is closed."""
        return self.breaker is None or self.breaker.closed

    async def ask(self, request: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The chat completion to `request`.

        Args:
            request: a request body of OpenAI's API.
            timeout_s: overrides the backend's time limit, for a request that has already waited.

        Raises:
            BackendDown: the process is not running.
            BackendFailed: the backend is down or too slow, or its answer is invalid.
            BackendRejected: the request is invalid for the model.
        """
        with self._monitored():
            async with asyncio.timeout(self.timeout_s if timeout_s is None else timeout_s):
                async with self._post(dict(request) | {"stream": False}) as response:
                    return normalize_completion(json.loads(await _read(response)), may_call="tools" in request)

    async def stream(self, request: Mapping[str, Any], timeout_s: float | None = None) -> Chunks:
        """Yields the chunks of the answer as they arrive, the last one with its usage. Closing it ends the request.

        Args:
            request: a request body of OpenAI's API.
            timeout_s: overrides the time limit of the first chunk, for a request that has already waited.

        Raises:
            BackendDown: the process is not running.
            BackendFailed: the backend is down or too slow, or its answer is invalid, perhaps after some chunks.
            BackendRejected: the request is invalid for the model.
        """
        received: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        # A separate task, because different tasks may read the answer, and a timeout belongs to one task.
        streamed = dict(request) | {"stream": True, "stream_options": {"include_usage": True}}
        pump = asyncio.create_task(self._pump(streamed, received, self.timeout_s if timeout_s is None else timeout_s))
        try:
            while (chunk := await received.get()) is not None:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def _pump(
        self, request: Mapping[str, Any], received: asyncio.Queue[dict[str, Any] | Exception | None], timeout_s: float
    ) -> None:
        """Puts each chunk into `received`, then None, or the error that ended the stream."""
        begun = False
        try:
            with self._monitored():
                async with (
                    asyncio.timeout(timeout_s) as deadline,
                    self._post(request) as response,
                    aclosing(normalize_chunks(_parse_events(response), may_call="tools" in request)) as chunks,
                ):
                    async for chunk in chunks:
                        if not begun:
                            begun = True
                            deadline.reschedule(asyncio.get_running_loop().time() + self.timeout_s)
                        received.put_nowait(chunk)
            received.put_nowait(None)
        except (BackendFailed, BackendRejected) as error:
            received.put_nowait(error)

    async def renders_functions(self) -> bool:
        """Whether the chat template puts functions, calls and results into the prompt. Asks llama.cpp once.

        Another server is assumed to support functions; it rejects them itself if it does not.

        Raises:
            BackendDown: the process is not running.
            BackendFailed: the backend is down or too slow, or its answer is invalid.
        """
        if not self.llama_cpp:
            return True
        if self._renders_functions is None:
            with self._monitored():
                async with asyncio.timeout(self.timeout_s):
                    self._renders_functions = await self._probe_template()
        return self._renders_functions

    async def _probe_template(self) -> bool:
        async with self._send("POST", self._template, self.timeout_s, json.dumps(_PROBE)) as response:
            try:
                prompt = str(json.loads(await _read(response))["prompt"])
            except HTTPStatusError as error:
                if error.status not in _TEMPLATE_FAILS:
                    raise
                return False
        return all(mark in prompt for mark in _PROBE_MARKS)

    async def count_prompt(self, request: Mapping[str, Any]) -> int | None:
        """Prompt tokens of `request`, counted by llama.cpp's server; None if the server does not answer."""
        try:
            content = json.dumps({"messages": request["messages"]})
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                async with self._send("POST", self._count, COUNT_TIMEOUT_S, content) as response:
                    return int(json.loads(await _read(response))["input_tokens"])
        except _FAILURES:
            return None

    def _post(self, request: Mapping[str, Any]) -> AbstractAsyncContextManager[Response]:
        return self._send("POST", self._chat, self.timeout_s, json.dumps(dict(request)))

    def _send(
        self, method: str, url: yarl.URL, timeout_s: float, content: str | None = None
    ) -> AbstractAsyncContextManager[Response]:
        body = None if content is None else content.encode()
        return self._transport.send(method, url, self._headers, body, timeout_s)

    @contextmanager
    def _monitored(self) -> Iterator[None]:
        """Checks the process and the circuit breaker before a request, translates its errors, updates the breaker."""
        breaker = self.breaker
        if not self._running():
            raise BackendDown("is not running")
        if breaker is not None and not breaker.admits():
            raise BackendFailed("was down")
        try:
            yield
        except _FAILURES as error:
            if isinstance(error, HTTPStatusError) and error.status in _INVALID_REQUEST:
                raise BackendRejected(str(error)) from None
            if breaker is not None:
                breaker.failed()
            raise BackendFailed(f"failed ({type(error).__name__})") from None
        if breaker is not None:
            breaker.succeeded()


async def _parse_events(response: Response) -> Chunks:
    """Yields the chunks of a stream of server-sent events, up to `[DONE]`."""
    if response.status >= _FIRST_ERROR:
        await _read(response)
    chunk = None
    async with aclosing(_lines(response)) as lines:
        async for line in lines:
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]" and chunk is not None:
                return
            chunk = json.loads(data)
            yield chunk
    raise ValueError("the stream broke off")


async def _lines(response: Response) -> AsyncGenerator[str, None]:
    """Yields the lines of the body, without their ends.

    Only CR and LF end a line: JSON may contain other separators, such as U+2028.

    Raises:
        ValueError: the body is too long, also within one line.
    """
    line, received = bytearray(), 0
    async for piece in response.body():
        if (received := received + len(piece)) > MOST_BYTES:
            raise ValueError("the answer is too long")
        for part in piece.splitlines(keepends=True):
            line += part
            if part.endswith((b"\n", b"\r")):
                yield line.decode(errors="replace").rstrip("\r\n")
                line.clear()
    if line:  # some servers do not end the last one
        yield line.decode(errors="replace")


async def _read(response: Response) -> bytes:
    """The complete body.

    Raises:
        HTTPStatusError: the status is an error; with the message of the body.
        ValueError: the body is too long.
    """
    body = bytearray()
    async for piece in response.body():
        body += piece
        if len(body) > MOST_BYTES:
            raise ValueError("the answer is too long")
    if response.status >= _FIRST_ERROR:
        raise HTTPStatusError(_error_message(bytes(body)), response.status)
    return bytes(body)


def _error_message(body: bytes) -> str:
    """The message of a backend's error response."""
    try:
        return str(json.loads(body)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return "rejected without a reason"
